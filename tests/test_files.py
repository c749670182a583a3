"""Files are whole or as they were."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from megatron_md.files import append, replace_file, replacing, sync, write_synced


def test_content_replaces_the_old_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_failure_leaves_the_old_content_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, b"old")
    with pytest.raises(OSError, match="full"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_synced_files_take_text_and_bytes(tmp_path: Path) -> None:
    write_synced(tmp_path / "t", "text ü")
    write_synced(tmp_path / "b", b"\x00\xff")
    sync(tmp_path)
    assert (tmp_path / "t").read_text(encoding="utf-8") == "text ü"
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"


def test_what_does_not_fit_whole_is_not_appended_at_all(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, "one\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append(path, "a line of more than the six bytes that are left\n")
        assert path.read_text() == "one\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append(path, "two \N{GREEK SMALL LETTER NU}\n")
    assert path.read_text(encoding="utf-8") == "one\ntwo \N{GREEK SMALL LETTER NU}\n"

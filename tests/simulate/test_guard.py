"""The compiled guard: made once, kept, and what is said where it cannot be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_md.errors import UserError
from megatron_md.simulate.guard import compiler, guard_library


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def test_it_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    library = guard_library()
    assert list((cache / "megatron_md").iterdir()) == [library]
    monkeypatch.setenv("PATH", "")
    assert guard_library() == library


def test_without_a_compiler_one_line_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        UserError, match=r"found no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\): install one, or name it in"
    ):
        guard_library()


def test_a_compiler_that_fails_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UserError, match=r"false cannot compile guard\.cpp: it ended with 1"):
        guard_library()
    assert list((cache / "megatron_md").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    (cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder of yours"):
        guard_library()

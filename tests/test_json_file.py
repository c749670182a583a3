"""Foreign JSON: what is no JSON, or beyond the limits, is named with the file and the way out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_md.json_file import as_record, parse_json, read_json, read_regular
from tests.hostile import refused


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"{", "Expecting property name enclosed in double quotes at line 1 column 2"),
        (b'{"a": NaN}', "the number NaN"),
        (b'{"a": -Infinity}', "the number -Infinity"),
        (b'{"a": 1e999}', "the number 1e999"),
        (b'{"a": %s}' % (b"9" * 5000), "a number of 5000 characters"),
        (b'{"a": "\\ud800"}', "a text with half a surrogate pair"),
        (b'{"\\uDFFF": 1}', "a text with half a surrogate pair"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": %s}' % (b"[" * 64 + b"]" * 64), "nested deeper than 64"),
        (b'{"a": %s' % (b"[" * 100_000), "nested deeper than 64"),
    ],
)
def test_what_json_has_not_is_named(data: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    assert refused(lambda: read_json(path, "restore it")) == f"{path}: malformed JSON ({problem}); restore it"


def test_what_is_within_the_limits_comes_back() -> None:
    deep = b"[" * 63 + b"1" + b"]" * 63
    assert parse_json(b'{"a": %s, "b": "\\ud83d\\ude00"}' % deep, "x", "")["b"] == "\U0001f600"
    assert parse_json("-123456789012345678901234567890", "x", "") == -123456789012345678901234567890
    assert parse_json("[0.1, 5e-324, 1.7976931348623157e308]", "x", "") == [0.1, 5e-324, 1.7976931348623157e308]


def test_what_is_no_readable_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"x" * 11)
    (tmp_path / "list").write_text("[]")
    for name, problem in (
        ("fifo", "is not a regular file"),
        (".", "is a directory"),
        ("none", "cannot be read (No such file or directory)"),
        ("large", "holds more than 10 bytes"),
        ("a\0b", "cannot be the name of a file"),
        ("\ud800", "cannot be the name of a file"),
    ):
        said = refused(lambda path=tmp_path / name: read_regular(path, "restore it", most_bytes=10))
        assert said == f"{tmp_path / name}: {problem}; restore it"
    assert refused(lambda: read_regular(Path("/dev/zero"), "y")) == "/dev/zero: is not a regular file; y"
    assert refused(lambda: read_json(tmp_path / "list", "y")) == f"{tmp_path / 'list'}: not a JSON object; y"


def test_records_have_their_types(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Entry:
        step: int
        loss: float
        rows: tuple[tuple[int, int], ...] = ()

    assert as_record(Entry, {"step": 1, "loss": 2, "rows": [[3, 4]]}, "x", "y") == Entry(1, 2.0, ((3, 4),))
    losses = [0.1, 1 / 3, 2.0**-1074, 1.7976931348623157e308, 123456789.123456789]
    assert [as_record(Entry, {"step": 0, "loss": loss}, "x", "y").loss for loss in losses] == losses
    for value, problem in (
        ({"step": 1}, "loss: Field required"),
        ({"step": "1", "loss": 1.0}, "step: Input should be a valid integer"),
        ({"step": 1, "loss": 1.0, "rows": [[1]]}, "rows: 0: 1: Field required"),
        ([], "Input should be an object"),
    ):
        assert refused(lambda value=value: as_record(Entry, value, "x", "y")) == f"x: {problem}; y"

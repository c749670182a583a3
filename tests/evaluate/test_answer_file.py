"""Answers on disk: whole lines or none, found again, and refused where they are of something else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_md.evaluate.answer_file import Answer, AnswerFile

IDENTITY = {"step": 3, "draws": 64}
ANSWERS = {
    "a": Answer(log_likelihood=-1.5, is_greedy=True, forward_passes=8, halves=(-1.0, -2.0)),
    "b": Answer(text="x = 1\n\u2028\x1b", forward_passes=4),
    "c": Answer(log_likelihood=-math.inf),
}


def test_answers_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    file = AnswerFile(path, IDENTITY)
    file.add({"a": ANSWERS["a"]})
    file.add({"b": ANSWERS["b"], "c": ANSWERS["c"]})
    assert AnswerFile(path, IDENTITY).known == file.known == ANSWERS
    assert len(path.read_text().split("\n")) == 1 + 3 + 1


def test_without_a_file_answers_are_in_memory(tmp_path: Path) -> None:
    file = AnswerFile(None, IDENTITY)
    file.add(ANSWERS)
    assert file.known == ANSWERS and not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [1, 30, 60])
def test_part_of_a_line_is_cut_off(left: int, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, IDENTITY).add({"a": ANSWERS["a"]})
    whole = path.read_bytes()
    AnswerFile(path, IDENTITY).add({"b": ANSWERS["b"]})
    path.write_bytes(path.read_bytes()[: len(whole) + left])
    file = AnswerFile(path, IDENTITY)
    assert file.known == {"a": ANSWERS["a"]} and path.read_bytes() == whole
    file.add({"c": ANSWERS["c"]})
    assert AnswerFile(path, IDENTITY).known.keys() == {"a", "c"}


@pytest.mark.parametrize("left", [0, 1, 12])
def test_a_file_cut_off_in_its_first_line_begins_anew(left: int, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, IDENTITY)
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    assert AnswerFile(path, IDENTITY).known == {} and path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"answers": 1, "step": 3, "draws": 32}, "holds answers of draws 32, not 64; remove it to start anew, or name"),
        ({"answers": 1, "step": 3}, "holds answers of draws None, not 64"),
        ({"answers": 1, **IDENTITY, "more": 1}, "holds answers of more 1, not None"),
        ({"answers": 2, **IDENTITY}, "holds no answers; remove it"),
        ([], "holds no answers"),
        ("text", "holds no answers"),
    ],
    ids=str,
)
def test_answers_of_something_else_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(content) + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        AnswerFile(path, IDENTITY)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["{}", "[", '{"request": "a", "answer": {"text": 3}}', "\xff"])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, IDENTITY).add({"a": ANSWERS["a"]})
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"answers.jsonl line 3: .*; remove it to start anew"):
        AnswerFile(path, IDENTITY)


def test_what_is_no_file_of_answers_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes")  # no newline: not what was cut off within the first line
    with pytest.raises(ValueError, match=r"notes\.txt: holds no answers"):
        AnswerFile(path, IDENTITY)
    assert path.read_text() == "my notes"

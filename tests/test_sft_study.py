"""The study of windows in fine-tuning: one right answer each, nothing judged is trained, all seeds are shown."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "examples/sft/study/windows.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("windows", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def right(prompt: str) -> str:
    """The answer, worked out from the prompt alone."""
    task, *words = prompt.split()
    if task == "reverse":
        return words[0][::-1]
    if task == "add":
        return str(int(words[0]) + int(words[1]))
    return dict(pair.split("=") for pair in words[2:])[words[0]]


def test_answers_are_right_wrong_ones_are_wrong_and_nothing_judged_is_trained(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "TRAINED", 600)
    study.write_tasks(tmp_path)
    judged = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    trained = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(judged) == study.JUDGED and len(trained) == 600
    for task in judged:
        assert task["answer"] == right(task["prompt"])
        assert len({task["answer"], *task["wrong"]}) == 4
    assert all(pair["completion"] == right(pair["prompt"]) for pair in trained)
    assert not {task["prompt"] for task in judged} & {pair["prompt"] for pair in trained}
    assert {task["task"] for task in judged} == {"reverse", "add", "find"}
    study.write_tasks(tmp_path / "again")
    for name in ("judged.jsonl", "train.jsonl", "valid.jsonl"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_table_and_picture_show_every_seed(study: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "judged").mkdir()
    for window, exacts in (("before", [0.0]), ("[0.5, 1]", [0.25, 0.75])):
        for seed, exact in enumerate(exacts):
            figures = {kind: {"exact": exact, "choice": 0.5, "nats": 2.0} for kind in ("reverse", "add", "find")}
            record = {"window": window, "run": "x", **figures}
            (tmp_path / "judged" / f"{window}-{seed}.json").write_text(json.dumps(record))
    lines = study.table(tmp_path).splitlines()
    assert lines[2].startswith("| before | 1 | 0.00, 0.50, 2.00 |")
    assert lines[3].startswith("| [0.5, 1] | 2 | 0.50 (0.25–0.75), 0.50 (0.50–0.50), 2.00 (2.00–2.00) |")
    pytest.importorskip("matplotlib")
    study.draw(tmp_path, tmp_path / "windows.png")
    assert (tmp_path / "windows.png").read_bytes().startswith(b"\x89PNG")

"""Comparing two runs: equal, apart from a step on, nothing in common."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_md.cli import main
from megatron_md.evaluate.compare import compare_runs, relative_difference


def write(run: Path, losses: list[Any], first: int = 1) -> Path:
    run.mkdir()
    records = [{"step": first + n, "tokens": n, "loss": loss, "lr": 0.1} for n, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def test_relative_difference() -> None:
    assert relative_difference(2.0, 1.0) == 0.5
    assert relative_difference(math.nan, math.nan) == 0.0 and relative_difference(0.0, 0.0) == 0.0
    assert relative_difference(math.nan, 1.0) == math.inf == relative_difference(math.inf, 1.0)


def test_the_first_step_beyond_the_tolerance_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", [3.0, 2.0, 1.0]), write(tmp_path / "b", [3.0, 2.00001, 1.5, 9.0])
    found = compare_runs(a, b, rtol=1e-4)["loss"]
    assert (found.steps, found.first_step, found.first_pair) == (3, 3, (1.0, 1.5))
    assert found.largest == pytest.approx(1 / 3)
    assert main(["compare", str(a), str(b), "--rtol", "1e-4"]) == 1
    assert "first beyond at step 3: 1 and 1.5" in capsys.readouterr().out


def test_equal_runs(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [3.0, None]), write(tmp_path / "b", [3.0, None])
    assert main(["compare", str(a), str(b), "--rtol", "0"]) == 0


def test_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", [1.0]), write(tmp_path / "b", [1.0], first=5)
    assert main(["compare", str(a), str(b)]) == 2
    assert "share no logged step" in capsys.readouterr().err
    assert main(["compare", str(a), str(tmp_path / "absent")]) == 2

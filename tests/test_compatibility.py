"""A run folder that an earlier state of the package left behind is still understood: resumed, inspected, evaluated.

`before_house/` was written by commit a27aaaf: 8 steps of `run.yaml`, of which the checkpoint at step 4 was kept.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_md.cli import main
from tests.ranks import run_ranks
from tests.train.test_trainer import metrics, without_times

BEFORE = Path(__file__).with_name("before_house")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BEFORE, tmp_path / "before"))


def command(folder: Path, *words: str) -> int:
    os.chdir(folder)
    return main(words)


def test_a_run_of_the_state_before_goes_on_as_it_did_then(folder: Path) -> None:
    recorded = without_times(metrics(folder / "run"))
    assert run_ranks(command, 1, folder, "train", "run.yaml") == [0]
    resumed = without_times(metrics(folder / "run"))
    assert [line["step"] for line in resumed] == list(range(1, 9))
    for now, then in zip(resumed, recorded, strict=True):
        assert set(then) <= set(now)
        for key in then.keys() - {"val_ce_by_rate"}:
            assert now[key] == pytest.approx(then[key], rel=1e-4), (now["step"], key)
    assert any("val_nelbo" in line for line in resumed[4:])


def test_it_is_inspected_and_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder / "run"), "--verify"]) == 0
    assert "step_00000004" in capsys.readouterr().out
    words = ("evaluate", "run", "--nelbo", "valid", "--rows", "4", "--json", "nelbo.json")
    assert run_ranks(command, 1, folder, *words) == [0]
    figures: dict[str, Any] = json.loads((folder / "nelbo.json").read_text())
    assert figures["step"] == 4
    then = next(line["val_nelbo"] for line in metrics(BEFORE / "run") if line["step"] == 4)
    assert abs(figures["nelbo"] - then) < 6 * figures["stderr"] + 0.05

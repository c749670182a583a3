"""The studies of examples/studies: their arms can be run and cost what they should, and calibration finds a minimum."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_md.config import load_config
from megatron_md.data.shards import load_manifest
from megatron_md.sweep.study import Study, flops
from tests.ranks import run_ranks

STUDIES = Path(__file__).parent.parent / "examples/studies"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def corpus(trained: Path) -> list[str]:
    return [
        f"data.train={trained / 'train'}", f"data.valid={trained / 'valid'}",
        f"data.tokenizer={trained / 'tokenizer.model'}", "train.device=cpu",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "runs"), [("windows", 33), ("50m", 5), ("repeat", 30), ("blocks", 18)])
def test_the_arms_of_a_study_can_be_run(name: str, runs: int, trained: Path, tmp_path: Path) -> None:
    smaller = ['sweep.grid={"data.max_tokens": [1024, 4096]}'] if name == "repeat" else []
    study = Study(STUDIES / f"{name}.yaml", [*corpus(trained), *smaller, f"run_dir={tmp_path / 'study'}"])
    assert len(study.runs) == runs and study.runs[0].arm == {"repeat": "AR", "blocks": "AR"}.get(name, "U[0, 1]")


def test_rivals_cost_the_same_and_get_their_best_rate(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("rivals")
    monkeypatch.setattr(module, "RATES", (0.001, 0.002))
    rivals = module.Rivals(tmp_path, corpus(trained), 1)
    rivals.arms["low rates"] = ["objective.mask_schedule=uniform:0,0.2"]
    swept: dict[str, Study] = {}

    def pretend(*words: Any) -> None:
        if words[0] == "schedule":
            for name in ("fitted.knots", "fitted.variance.knots"):
                (tmp_path / name).write_text("0 1\n1 1\n")
            return
        study = swept[Path(words[1]).stem] = Study(words[1], [*map(str, words[2:-2])])
        study.directory.mkdir(exist_ok=True)
        lines = [f'"{run.arm}",{run.point},{run.config.optimizer.lr}' for run in study.runs]  # the lower rate is better
        (study.directory / "results.csv").write_text("\n".join(["arm,point,val_nelbo", *lines]))

    monkeypatch.setattr(module, "command", pretend)
    rivals.run([1, 4])
    assert (
        len(rivals.arms) == 12
        and len(swept["rates"].runs) == 2 * len(rivals.arms)
        and len(swept["4x"].runs) == 3 * len(rivals.arms)
    )
    assert {run.config.optimizer.lr for run in swept["1x"].runs} == {0.001}
    for name, budget in (("1x", 1), ("4x", 4)):
        fitted = [run.arm in ("P-POTS", "signal-aligned") for run in swept[name].runs]
        costs = np.array([flops(run.config) for run in swept[name].runs])
        wanted = np.where(fitted, budget - 0.25 - 2048 / 64 / 400, budget) * rivals.cost([], 400)
        assert sum(fitted) == 6 and np.allclose(costs, wanted, rtol=2e-3)
    pilot = swept["pilot"].runs[0].config
    assert (pilot.train.steps, pilot.seed, pilot.objective.mask_schedule) == (100, 0, "uniform:0,1")
    low = [run.config.train.steps for run in swept["1x"].runs if run.arm == "low rates"]
    assert low[0] > 405, "its head sees less, so that it gets more steps"


@pytest.mark.slow
def test_the_corpora_of_the_studies_are_made(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = ["bash", str(STUDIES / "corpora.sh")]
    for _ in range(2):  # what is there already is kept
        subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True)
    study = Study(STUDIES / "windows.yaml", [f"run_dir={tmp_path}/study", *(
        f"data.{key}={tmp_path / 'corpus/studies/python' / name}"
        for key, name in (("train", "train"), ("valid", "valid"), ("tokenizer", "tokenizer.model"))
    )])  # fmt: skip
    assert 3_000_000 < load_manifest(study.runs[0].config.data.corpora()[0].manifest).tokens < 5_000_000
    done = subprocess.run([*words, "latin"], cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "corpora.sh: no corpus 'latin'; there are python and english\n")


@pytest.mark.distributed
def test_the_fitted_temperature_is_the_best_one_where_it_was_fitted(trained: Path) -> None:
    found = run_ranks(_calibrated_on_training_rows, 1, trained / "run")[0]
    assert all(held <= ce for held, ce in zip(found["calibrated_ce"], found["ce"], strict=True))
    assert min(found["temperature"]) < 1.0, "a model of two steps is too unsure"
    assert np.isfinite(found["ce"]).all() and len(found["rate"]) == 10


def _calibrated_on_training_rows(run: Path) -> Any:
    module = script("calibration")
    config = load_config(run / "config.yaml")
    again = replace(config, data=replace(config.data, valid=config.data.corpora()[0].manifest))
    module.load_config = lambda path: again
    return module.calibrate(run, 4)

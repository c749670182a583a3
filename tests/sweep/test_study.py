"""Studies: what runs, what cannot be compared, what it costs, and that a killed one comes to the same table."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_md.cli import main
from megatron_md.config import as_dict
from megatron_md.config.loader import ConfigError
from megatron_md.sweep.study import Study, flops, summary_of
from tests.trained_run import run_config

PICTURES = ("nelbo.png", "differences.png", "ce_by_rate.png")
ARMS = {"U[0, 1]": [], "window": ["objective.mask_schedule=paper"]}


def write_study(trained: Path, folder: Path, arms: dict[str, list[str]] = ARMS, **sections: Any) -> Path:
    config = as_dict(run_config(trained, "unused", objective={"mask_schedule": "uniform:0,1"}, **sections))
    config |= {"run_dir": str(folder / "study"), "sweep": {"arms": arms, "seeds": [1, 2]}}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_every_arm_is_a_run_with_every_seed(trained: Path, tmp_path: Path) -> None:
    path = write_study(trained, tmp_path)
    study = Study(path, ["train.steps=3", 'sweep.grid={"optimizer.lr": [0.001, 0.002]}'])
    assert [(run.name, run.seed) for run in study.runs[:4]] == [
        ("U[0, 1], lr 0.001", 1), ("U[0, 1], lr 0.002", 1), ("window, lr 0.001", 1), ("window, lr 0.002", 1),
    ]  # fmt: skip
    assert (study.runs[2].arm, study.runs[2].point) == ("window", "lr 0.001")
    assert len(study.runs) == 8 and len({run.directory for run in study.runs}) == 8
    last = study.runs[-1].config
    assert (last.seed, last.optimizer.lr, last.objective.mask_schedule, last.train.steps) == (2, 0.002, "paper", 3)
    assert Path(last.run_dir) == study.runs[-1].directory == tmp_path / "study/window_lr_0.002/seed_2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.seq_length=16"], r"sweep.arms\[b\]: data.seq_length is 16, and 32 in the study: .* do not compare"),
        (["validation.sequences=3"], r"sweep.arms\[b\]: validation.sequences is 3"),
        (["data.valid={trained}/train"], r"sweep.arms\[b\]: data.valid is .*/train, and .*/valid in the study"),
        (["objective.mask_schedule=papre"], r"sweep.arms\[b\]: .*did you mean 'paper'"),
        (["train.stepz=3"], r"sweep.arms\[b\]: .*train.stepz; did you mean train.steps"),
    ],
)
def test_arms_that_cannot_be_run_or_compared_are_refused(
    words: Sequence[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(trained, tmp_path, {"a": [], "b": [word.format(trained=trained) for word in words]})
    with pytest.raises(ConfigError, match=message) as caught:
        Study(path)
    assert all("\n" not in line for line in caught.value.lines)
    assert main(["sweep", str(path)]) == 2 and not (tmp_path / "study").exists()
    assert capsys.readouterr().err.startswith("megatron-md: ")


def test_nothing_validated_and_unknown_keys_are_refused(trained: Path, tmp_path: Path) -> None:
    path = write_study(trained, tmp_path)
    with pytest.raises(ConfigError, match=r"nothing is validated: set data.valid and validation.sequences"):
        Study(path, ["validation.sequences=0"])
    with pytest.raises(ConfigError, match=r"sweep.sedes; did you mean sweep.seeds"):
        Study(path, ["sweep.sedes=[1]"])


def test_a_dry_run_lists_runs_and_costs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(trained, tmp_path)
    runs = Study(path).runs
    assert flops(runs[0].config) == pytest.approx(flops(runs[1].config)), "both have a mean mask rate of one half"
    capsys.readouterr()
    assert main(["sweep", str(path), "--dry-run", "train.steps=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].split()[:3] == ["0", "to", "do"]
    assert lines[4].startswith(f"4 runs, {8 * flops(runs[0].config):.3g} FLOPs; hours are known once"), (
        "twice the steps"
    )
    assert main(["sweep", str(path), "--report", "--reference", "windo"]) == 2
    assert "--reference windo: the study has the arms U[0, 1], window" in capsys.readouterr().err
    assert main(["sweep", str(path), "--report"]) == 2
    assert "results.csv: no such file; make it with `megatron-md sweep STUDY.yaml`" in capsys.readouterr().err
    assert main(["sweep", str(path), "--only", "4"]) == 2
    assert "--only 4: the study has runs 0 to 3" in capsys.readouterr().err


def figures(folder: Path) -> list[dict[str, str]]:
    """The table without times."""
    with (folder / "study/results.csv").open(newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_saves_the_runs_that_are_under_way(trained: Path, tmp_path: Path) -> None:
    path = write_study(trained, tmp_path, checkpoint={"every_steps": 0})
    words = [sys.executable, "-m", "megatron_md", "sweep", str(path), "train.steps=100000"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    run = tmp_path / "study/U_0_1/seed_1"
    for _ in range(1200):
        if (run / "metrics.jsonl").exists():
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == 1
    assert (run / "checkpoints/latest").is_file(), (run / "log.txt").read_text()
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_study_comes_to_the_same_table(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    path = write_study(trained, tmp_path / "whole", checkpoint={"every_steps": 1})
    assert main(["sweep", str(path), "--only", "3"]) == 0
    assert not (tmp_path / "whole/study/results.csv").exists(), "one run of an array writes no table"
    assert main(["sweep", str(path), "--workers", "2"]) == 0
    printed = capsys.readouterr()
    assert "4 runs, 1 of them done already" in printed.err and "less U[0, 1] [95 %]" in printed.out
    assert main(["sweep", str(path), "--dry-run"]) == 0
    assert "0.00 hours left, one run at a time" in capsys.readouterr().out
    report = (tmp_path / "whole/study/report.md").read_text()
    assert all((tmp_path / "whole/study" / name).is_file() and name in report for name in PICTURES)
    with (tmp_path / "whole/study/results.jsonl").open() as lines:
        assert [json.loads(line)["arm"] for line in lines] == ["U[0, 1]", "window"] * 2
    whole = figures(tmp_path / "whole")
    assert [(row["arm"], row["seed"]) for row in whole] == [
        ("U[0, 1]", "1"), ("window", "1"), ("U[0, 1]", "2"), ("window", "2"),
    ]  # fmt: skip
    assert len({row["val_nelbo"] for row in whole}) == 4

    path = write_study(trained, tmp_path / "killed", checkpoint={"every_steps": 1})
    process = subprocess.Popen([sys.executable, "-m", "megatron_md", "sweep", str(path)], stderr=subprocess.PIPE)
    begun = tmp_path / "killed/study/window/seed_1/metrics.jsonl"
    for _ in range(1200):
        if begun.exists():
            break
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=60)  # the worker holds the pipe open: it is gone once this returns
    assert main(["sweep", str(path)]) == 0
    told = capsys.readouterr().err
    assert "4 runs, 1 of them done already" in told and "left, about" in told
    assert figures(tmp_path / "killed") == whole

    # What is there was another study's: nothing is done again, nothing is overwritten.
    with pytest.raises(ConfigError, match="was run with another config; move it away, or give the arm another name"):
        Study(path, ["optimizer.lr=0.123"]).run()
    run = Study(path).runs[0]
    (run.directory / "summary.json").write_text(json.dumps({"status": "failed"}))
    assert summary_of(run) is None


ANNEAL = '{name: anneal, from: paper, to: "uniform:0,1", over: [0.5, 1]}'


@pytest.mark.parametrize("words", [[], ["model.preset=50m"], [f"objective.mask_schedule={ANNEAL}"]])
def test_a_run_of_a_version_that_lacked_a_key_is_still_done(words: list[str], trained: Path, tmp_path: Path) -> None:
    run = Study(write_study(trained, tmp_path), words).runs[0]
    run.directory.mkdir(parents=True)
    (run.directory / "summary.json").write_text(json.dumps({"status": "finished", "val_nelbo": 1.5}))
    config = as_dict(run.config)
    for changed, is_same in (({}, True), ({"dropout": 0.25}, False)):
        older = {
            **config,
            "train": {key: value for key, value in config["train"].items() if key != "dropout"} | changed,
        }
        (run.directory / "arm.yaml").write_text(yaml.safe_dump(older))
        if is_same:
            assert summary_of(run) == {"status": "finished", "val_nelbo": 1.5}
        else:
            with pytest.raises(ConfigError, match="was run with another config"):
                summary_of(run)

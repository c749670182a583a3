"""Sweeps: what runs, what is not repeated, the table and its file."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_md.config.loader import ConfigError, to_yaml
from megatron_md.parity.config import ParityConfig
from megatron_md.parity.sweep import censored_median, csv_row, rows_of, run_sweep, runs_of, summary_of, table
from megatron_md.sweep import runner
from megatron_md.sweep.plan import SweepRun
from megatron_md.sweep.table import by_arm, write_table
from tests.parity.parity_config import small

ARMS = {"low": ["objective.mask_schedule=uniform:0,0.3"], "direct": ["objective.name=direct_supervision"]}


def config_for(folder: Path, arms: dict[str, list[str]] = ARMS) -> ParityConfig:
    return small(folder, denoiser="uniform_attention", sweep={"arms": arms, "seeds": [4, 5]})


def pretend(run: SweepRun[ParityConfig], reached: int | None = 2, **summary: Any) -> None:
    """The files that a finished run leaves."""
    run.directory.mkdir(parents=True, exist_ok=True)
    run.directory.joinpath("config.yaml").write_text(to_yaml(run.config))
    values: dict[str, Any] = {
        "status": "finished", "step": 4, "reached_step": reached, "memorised_step": None, "train_accuracy": 1.0,
        "valid_accuracy": 0.9, "largest_gap": 0.125, "largest_gap_step": 2, "signal_probability": 0.4, "seconds": 3.0,
    }  # fmt: skip
    run.directory.joinpath("summary.json").write_text(json.dumps(values | summary))
    metrics = [
        {"step": 1, "signal_share": 0.25},
        {"step": 2, "signal_share": 0.35, "train_accuracy": 0.75, "valid_accuracy": 0.5},
        {"step": 4, "signal_share": 0.3, "train_accuracy": 1.0, "valid_accuracy": 0.9},
    ]
    run.directory.joinpath("metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))


def test_every_arm_runs_with_every_seed(tmp_path: Path) -> None:
    runs = runs_of(config_for(tmp_path))
    assert [(run.arm, run.config.seed) for run in runs] == [("low", 4), ("direct", 4), ("low", 5), ("direct", 5)]
    assert runs[2].config.objective.mask_schedule == "uniform:0,0.3"
    assert runs[3].config.objective.name == "direct_supervision"
    assert len({run.config.run_dir for run in runs}) == 4
    assert all(Path(run.config.run_dir).is_relative_to(tmp_path) for run in runs)


def test_arms_are_run_at_every_point_of_the_grid(tmp_path: Path) -> None:
    grid: dict[str, list[Any]] = {"task.train_samples": [20, None], "optimizer.weight_decay": [0, 0.1]}
    config = small(tmp_path, denoiser="uniform_attention", sweep={"arms": ARMS, "seeds": [1], "grid": grid})
    runs = {run.name: run.config for run in runs_of(config)}
    assert len(runs) == 8
    run = runs["direct, train_samples None, weight_decay 0.1"]
    assert run.task.train_samples is None and run.optimizer.weight_decay == 0.1
    assert run.objective.name == "direct_supervision"


def test_without_arms_and_seeds_there_is_the_run_itself(tmp_path: Path) -> None:
    (run,) = runs_of(small(tmp_path, seed=9))
    assert run.config.seed == 9


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"a": ["objective.mask=1"]}, r"sweep\.arms\[a\]: .*unknown key objective\.mask"),
        ({"a": ["task.k=9"]}, r"sweep\.arms\[a\]: task\.k 9 is above task\.n 6"),
        ({"U[0, 1]": [], "U(0,1)": []}, "two arms would be written to U_0_1"),
    ],
)
def test_a_bad_arm_is_refused_before_anything_runs(arms: dict[str, list[str]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        runs_of(config_for(tmp_path, arms))


def test_only_a_finished_run_of_the_same_config_counts(tmp_path: Path) -> None:
    run, other, *_ = runs_of(config_for(tmp_path))
    assert summary_of(run) is None
    pretend(run)
    pretend(other, status="running")
    assert summary_of(run) is not None and summary_of(other) is None
    changed = small(run.directory, denoiser="uniform_attention", seed=4, train={"steps": 5})
    assert summary_of(SweepRun("low", "", 4, run.directory, changed)) is None


def test_the_table_and_its_file(tmp_path: Path) -> None:
    runs = runs_of(config_for(tmp_path))
    for run, reached in zip(runs[:3], (100, None, 300), strict=True):
        pretend(run, reached, signal_probability=None if run.arm == "direct" else 0.4)
    write_table(tmp_path / "parity.csv", [row for run in runs if (row := csv_row(tmp_path, run)) is not None])
    rows = rows_of(tmp_path)
    assert [(row["arm"], row["seed"], row["reached_step"]) for row in rows] == [
        ("low", "4", "100"), ("direct", "4", ""), ("low", "5", "300"),
    ]  # fmt: skip
    assert float(rows[0]["signal_share"]) == pytest.approx(0.3)
    assert {name: censored_median(part) for name, part in by_arm(rows).items()} == {"low": 200, "direct": math.inf}
    text = table(rows)
    assert "2/2" in text and "200 (100 to 300)" in text and "0/1" in text and "> 4" in text and "0.4000" in text


def test_a_sweep_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="megatron-md parity sweep"):
        rows_of(tmp_path)


@pytest.mark.slow
def test_a_sweep_resumes_and_survives_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path)
    runs = runs_of(config)
    pretend(runs[0])
    # A directory where a run wants to write a file.
    obstacle = runs[1].directory / "log.txt"
    obstacle.mkdir(parents=True)
    rows, failed = run_sweep(config, workers=1)
    assert failed == 1 and "direct" in table(rows)
    with (tmp_path / "parity.csv").open() as file:
        done = {(row["arm"], row["seed"]): row for row in csv.DictReader(file)}
    assert set(done) == {("low", "4"), ("low", "5"), ("direct", "5")}
    assert done["low", "4"]["seconds"] == "3.0", "a finished run was repeated"
    printed = capsys.readouterr()
    assert "4 runs, 1 of them done already" in printed.err and "failed" in printed.err
    # Once the obstacle is gone, only that run is left.
    obstacle.rmdir()
    started: list[str] = []

    def only_noted(_: Any, runs: Sequence[SweepRun[ParityConfig]], workers: int) -> Iterator[tuple[Any, None]]:
        for run in runs:
            started.append(run.config.run_dir)
            pretend(run)
            yield run, None

    monkeypatch.setattr(runner, "in_processes", only_noted)
    assert run_sweep(config, workers=1)[1] == 0
    assert started == [runs[1].config.run_dir]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_sweep_leaves_no_worker_and_is_resumed(tmp_path: Path) -> None:
    config = small(
        tmp_path / "sweep",
        denoiser="uniform_attention",
        accuracy={"every_steps": 100, "stop_at": None},
        train={"steps": 400},
        sweep={"seeds": [1, 2]},
    )
    file = tmp_path / "sweep.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "megatron_md", "parity", "sweep", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    second = tmp_path / "sweep/run/seed_2/metrics.jsonl"
    for _ in range(2500):
        if second.exists():
            break
        time.sleep(0.1)
    process.kill()
    # The worker holds the pipe open: it is gone once this returns.
    process.communicate(timeout=30)
    assert json.loads(second.with_name("summary.json").read_text())["status"] == "running"
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "2 runs, 1 of them done already" in done.stderr
    assert [row["seed"] for row in rows_of(tmp_path / "sweep")] == ["1", "2"]

"""A sweep of parity runs: its table, parity.csv, and what is read off it."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_md import run_files
from megatron_md.config import loader as config_loader
from megatron_md.evaluate.plot import read_metrics
from megatron_md.json_file import read_json, read_regular
from megatron_md.messages import shown
from megatron_md.parity.config import ParityConfig, check_parity
from megatron_md.sweep.plan import SweepConfig, SweepRun, expand
from megatron_md.sweep.runner import Sweep
from megatron_md.sweep.table import Row, by_arm, read_csv

CSV_NAME = "parity.csv"
_FIGURES = {
    **dict.fromkeys(("reached_step", "memorised_step", "largest_gap_step"), int | None),
    **dict.fromkeys(("train_accuracy", "valid_accuracy", "largest_gap", "signal_probability"), int | float | None),
    "seconds": int | float,
}


def summary_of(run: SweepRun[ParityConfig]) -> dict[str, Any] | None:
    """What came of a run, if it has been run to its end exactly as configured."""
    try:
        summary = read_json(run.directory / run_files.SUMMARY, "the run is done again")
        resolved = read_regular(run.directory / run_files.CONFIG, "the run is done again").decode()
    except ValueError:
        return None
    if not all(isinstance(summary.get(key), kind) for key, kind in _FIGURES.items()):
        return None
    is_done = summary.get("status") == "finished" and resolved == config_loader.to_yaml(run.config)
    return summary if is_done else None


def runs_of(config: ParityConfig) -> list[SweepRun[ParityConfig]]:
    """The runs of a sweep.

    Raises:
        ConfigError: see `expand`.
    """
    base = replace(config, sweep=SweepConfig())
    directory = Path(config.run_dir)
    return expand(config.sweep, directory, config.seed, lambda words: with_words(base, words), check_parity)


def with_words(config: ParityConfig, words: Sequence[str]) -> ParityConfig:
    """The config with `section.key=value` words applied.

    Raises:
        ConfigError: they cannot be.
    """
    mapping = asdict(config)
    overridden = config_loader.apply_overrides(mapping, words)
    return config_loader.validate(ParityConfig, mapping, "config", overridden)


def run_sweep(config: ParityConfig, *, workers: int = 1) -> tuple[list[Row], int]:
    """Run what is not done yet, and write RUN_DIR/parity.csv after every run.

    Args:
        config: the sweep.
        workers: processes at a time, each with one thread.

    Returns:
        The lines of parity.csv (for `table`), and how many runs failed.

    Raises:
        ConfigError: see `expand`.
    """
    directory = Path(config.run_dir)
    sweep = Sweep(
        runs_of(config),
        directory / CSV_NAME,
        start=_run,
        row=lambda run: csv_row(directory, run),
        verdict=_verdict,
    )
    rows, failed = sweep.run(workers)
    return (rows_of(directory) if rows else []), failed


def rows_of(directory: Path) -> list[Row]:
    """The lines of DIRECTORY/parity.csv.

    Raises:
        UserError: there is no such file.
    """
    return read_csv(directory / CSV_NAME, "megatron-md parity sweep")


def _run(config: ParityConfig) -> None:
    from megatron_md.parity.experiment import run_experiment

    run_experiment(config)


def _verdict(row: dict[str, Any]) -> str:
    goal = f"{row['goal']:.0%} validation accuracy"
    if row["reached_step"] is not None:
        return f"{goal} at step {row['reached_step']}, {row['seconds']:.0f} s"
    return (
        f"{goal} not reached in {row['steps']} steps (train {row['train_accuracy']:.3f}, "
        f"validation {row['valid_accuracy']:.3f}), {row['seconds']:.0f} s"
    )


def _goal(config: ParityConfig) -> float:
    return 0.99 if config.accuracy.stop_at is None else config.accuracy.stop_at


def csv_row(directory: Path, run: SweepRun[ParityConfig]) -> dict[str, Any] | None:
    """A run's line of DIRECTORY/parity.csv, if it has finished."""
    summary = summary_of(run)
    if summary is None:
        return None
    config = run.config
    shares = [record["signal_share"] for record in read_metrics(run.directory) if "signal_share" in record]
    schedule = config.objective.mask_schedule
    return {
        "arm": run.name,
        "seed": config.seed,
        "n": config.task.n,
        "k": config.task.k,
        "train_samples": config.task.train_samples,
        "denoiser": config.denoiser,
        "objective": config.objective.name,
        "mask_schedule": schedule if isinstance(schedule, str) else json.dumps(schedule),
        "lr": config.optimizer.lr,
        "weight_decay": config.optimizer.weight_decay,
        "batch": config.train.global_batch_size,
        "steps": config.train.steps,
        "goal": _goal(config),
        "reached_step": summary["reached_step"],
        "memorised_step": summary["memorised_step"],
        **{
            key: _rounded(summary[key])
            for key in ("train_accuracy", "valid_accuracy", "largest_gap", "largest_gap_step", "signal_probability")
        },
        "signal_share": _rounded(statistics.fmean(shares)),
        "seconds": round(summary["seconds"], 1),
        "run": str(run.directory.relative_to(directory)),
    }


def _rounded(value: float | None) -> float | None:
    return value if value is None else round(value, 5)


def censored_median(rows: Sequence[Row]) -> float:
    """Median steps to the goal, a run that did not reach it counting as infinitely long."""
    return statistics.median(float(row["reached_step"] or math.inf) for row in rows)


def table(rows: Sequence[Row]) -> str:
    """The arms side by side: how many seeds reached the goal and in how many steps, gaps, accuracies."""
    result = Table("arm", "P_S", "reached", "median steps (range)", "largest gap", "memorised", "validation", "seconds")
    for arm, runs in by_arm(rows).items():
        cap = max(int(row["steps"]) for row in runs)
        reached = sorted(int(row["reached_step"]) for row in runs if row["reached_step"])
        median = censored_median(runs)
        text = f"> {cap}" if math.isinf(median) else f"{median:g}"
        if reached:
            text += f" ({reached[0]} to {reached[-1] if len(reached) == len(runs) else f'> {cap}'})"
        accuracies = sorted(float(row["valid_accuracy"]) for row in runs)
        result.add_row(
            Text(shown(arm)),
            f"{float(runs[0]['signal_probability']):.4f}" if runs[0]["signal_probability"] else "",
            f"{len(reached)}/{len(runs)}",
            text,
            f"{max(float(row['largest_gap']) for row in runs):.3f}",
            f"{sum(bool(row['memorised_step']) for row in runs)}/{len(runs)}",
            f"{accuracies[0]:.3f} to {accuracies[-1]:.3f}",
            f"{sum(float(row['seconds']) for row in runs):.0f}",
        )
    console = Console(width=120, file=io.StringIO())
    console.print(result)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()

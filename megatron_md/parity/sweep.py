"""A sweep: every arm with every seed, in parallel processes, resumable; one table and parity.csv."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_md import run_files
from megatron_md.config import loader as config_loader
from megatron_md.config.loader import ConfigError
from megatron_md.errors import UserError
from megatron_md.evaluate.plot import read_metrics
from megatron_md.files import replace_file
from megatron_md.json_file import read_json, read_regular
from megatron_md.messages import shown, tell
from megatron_md.parity.config import ParityConfig, SweepConfig, check_parity
from megatron_md.processes import die_with_parent

CSV_NAME = "parity.csv"
_FIGURES = {
    **dict.fromkeys(("reached_step", "memorised_step", "largest_gap_step"), int | None),
    **dict.fromkeys(("train_accuracy", "valid_accuracy", "largest_gap", "signal_probability"), int | float | None),
    "seconds": int | float,
}


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    arm: str
    config: ParityConfig

    @property
    def directory(self) -> Path:
        """Where it is."""
        return Path(self.config.run_dir)

    def summary(self) -> dict[str, Any] | None:
        """What came of it, if it has been run to its end exactly as configured."""
        try:
            summary = read_json(self.directory / run_files.SUMMARY, "the run is done again")
            resolved = read_regular(self.directory / run_files.CONFIG, "the run is done again").decode()
        except ValueError:
            return None
        if not all(isinstance(summary.get(key), kind) for key, kind in _FIGURES.items()):
            return None
        is_done = summary.get("status") == "finished" and resolved == config_loader.to_yaml(self.config)
        return summary if is_done else None


def expand(config: ParityConfig) -> list[SweepRun]:
    """The runs of a sweep: all arms with the first seed, then all with the second, and so on.

    Raises:
        ConfigError: an arm's words cannot be applied, an arm cannot be run, or two arms would share a directory.
    """
    arms = _arms_on_grid(config.sweep)
    folders = [_folder(arm) for arm in arms]
    for name in sorted({name for name in folders if folders.count(name) > 1}):
        raise ConfigError([f"sweep.arms: two arms would be written to {name}; give them other names"])
    variants = []
    for (arm, words), folder in zip(arms.items(), folders, strict=True):
        try:
            variant = with_words(replace(config, sweep=SweepConfig()), words)
            check_parity(variant)
        except ConfigError as error:
            raise ConfigError([f"sweep.arms[{arm}]: {line}" for line in error.lines]) from None
        variants.append((arm, Path(config.run_dir) / folder, variant))
    return [
        SweepRun(arm, replace(variant, seed=seed, run_dir=str(directory / f"seed_{seed}")))
        for seed in config.sweep.seeds or [config.seed]
        for arm, directory, variant in variants
    ]


def _arms_on_grid(sweep: SweepConfig) -> dict[str, list[str]]:
    """Name and words of each arm at each point of the grid."""
    points: list[tuple[str, list[str]]] = [
        (
            "".join(f", {key.rpartition('.')[2]} {value}" for key, value in zip(sweep.grid, values, strict=True)),
            [f"{key}={json.dumps(value)}" for key, value in zip(sweep.grid, values, strict=True)],
        )
        for values in itertools.product(*sweep.grid.values())
    ]
    arms = sweep.arms or {"run": []}
    return {f"{arm}{name}": [*words, *more] for arm, words in arms.items() for name, more in points}


def with_words(config: ParityConfig, words: Sequence[str]) -> ParityConfig:
    """The config with `section.key=value` words applied.

    Raises:
        ConfigError: they cannot be.
    """
    mapping = asdict(config)
    overridden = config_loader.apply_overrides(mapping, words)
    return config_loader.validate(ParityConfig, mapping, "config", overridden)


def _folder(arm: str) -> str:
    return re.sub(r"[^\w.]+", "_", arm).strip("_") or "arm"


def run_sweep(config: ParityConfig, *, workers: int = 1) -> tuple[list[dict[str, str]], int]:
    """Run what is not done yet, and write RUN_DIR/parity.csv after every run.

    Args:
        config: the sweep.
        workers: processes at a time, each with one thread.

    Returns:
        The lines of parity.csv (for `table`), and how many runs failed.

    Raises:
        ConfigError: see `expand`.
    """
    runs, directory = expand(config), Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    rows = {run.directory: row for run in runs if (row := csv_row(directory, run)) is not None}
    todo = [run for run in runs if run.directory not in rows]
    tell(f"{len(runs)} runs, {len(rows)} of them done already")

    def write() -> None:
        if rows:
            write_csv(directory, [rows[run.directory] for run in runs if run.directory in rows])

    write()
    failed = 0
    with _pool(workers) as pool:
        futures: dict[Future[None], SweepRun] = {pool.submit(_run_in_worker, run.config): run for run in todo}
        for future in as_completed(futures):
            run, error = futures[future], future.exception()
            if error is not None:
                failed += 1
                tell(f"{run.directory} failed: {type(error).__name__}: {error} (see {run.directory / 'log.txt'})")
                continue
            row = csv_row(directory, run)
            assert row is not None, "it has just been run"
            tell(f"{run.directory}: {_verdict(row)}")
            rows[run.directory] = row
            write()
    return (read_csv(directory) if rows else []), failed


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that start clean and do not outlive this one, however it ends."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent, initargs=(os.getpid(),))
    try:
        yield pool
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _run_in_worker(config: ParityConfig) -> None:
    """One run; what it prints goes into its directory."""
    os.environ["OMP_NUM_THREADS"] = "1"
    directory = Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    log = (directory / "log.txt").open("w", buffering=1)
    with log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
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


def write_csv(directory: Path, rows: Sequence[dict[str, Any]]) -> None:
    """DIRECTORY/parity.csv: a line per finished run."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(directory / CSV_NAME, text.getvalue())


def csv_row(directory: Path, run: SweepRun) -> dict[str, Any] | None:
    """A run's line of DIRECTORY/parity.csv, if it has finished."""
    summary = run.summary()
    if summary is None:
        return None
    config = run.config
    shares = [record["signal_share"] for record in read_metrics(run.directory) if "signal_share" in record]
    schedule = config.objective.mask_schedule
    return {
        "arm": run.arm,
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


def read_csv(directory: Path) -> list[dict[str, str]]:
    """The lines of DIRECTORY/parity.csv.

    Raises:
        UserError: there is no such file.
    """
    path = directory / CSV_NAME
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it with `megatron-md parity sweep`")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_arm(rows: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The lines of each arm, in order of appearance."""
    arms: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return arms


def censored_median(rows: Sequence[dict[str, str]]) -> float:
    """Median steps to the goal, a run that did not reach it counting as infinitely long."""
    return statistics.median(float(row["reached_step"] or math.inf) for row in rows)


def table(rows: Sequence[dict[str, str]]) -> str:
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

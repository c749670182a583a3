"""The runs of a sweep in parallel processes: those that are done are not done again, the table grows with each."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_md.messages import tell
from megatron_md.processes import die_with_parent
from megatron_md.sweep.plan import SweepRun
from megatron_md.sweep.table import write_table

C = TypeVar("C")


class Sweep(Generic[C]):
    """Runs, and what a finished one says.

    Attributes:
        runs: all of them.
        path: the table, if there is one.
    """

    def __init__(
        self,
        runs: list[SweepRun[C]],
        path: Path | None,
        *,
        start: Callable[[C], object],
        row: Callable[[SweepRun[C]], dict[str, Any] | None],
        verdict: Callable[[dict[str, Any]], str],
        cost: Callable[[C], float] = lambda config: 1.0,
    ) -> None:
        """Nothing is run yet.

        Args:
            runs: what to run.
            path: CSV file to write, if any.
            start: does one run, in a process of its own: a function of a module.
            row: a run's line of the table, if it is done exactly as configured.
            verdict: what to tell of a line.
            cost: of a run, in any unit: what the time that is left is reckoned by.
        """
        self.runs, self.path = runs, path
        self._start, self._row, self._verdict, self._cost = start, row, verdict, cost

    def run(self, workers: int = 1) -> tuple[list[dict[str, Any]], int]:
        """Run what is not done yet, and write the table after every run.

        Args:
            workers: processes at a time, each with one thread.

        Returns:
            The lines of the table, and how many runs failed.
        """
        rows = {run.directory: row for run in self.runs if (row := self._row(run)) is not None}
        todo = [run for run in self.runs if run.directory not in rows]
        tell(f"{len(self.runs)} runs, {len(rows)} of them done already")
        self._write(rows)
        failed, begin = 0, time.monotonic()
        left = {run.directory: self._cost(run.config) for run in todo}
        whole = math.fsum(left.values())
        with pool(workers) as processes:
            futures: dict[Future[None], SweepRun[C]] = {
                processes.submit(in_worker, self._start, run.config, run.directory): run for run in todo
            }
            for future in as_completed(futures):
                run, error = futures[future], future.exception()
                del left[run.directory]
                if error is not None:
                    failed += 1
                    tell(f"{run.directory} failed: {type(error).__name__}: {error} (see {run.directory / 'log.txt'})")
                    continue
                row = self._row(run)
                if row is None:
                    failed += 1
                    tell(f"{run.directory} failed: it ended without figures (see {run.directory / 'log.txt'})")
                    continue
                rest = math.fsum(left.values())
                minutes = (time.monotonic() - begin) * rest / (whole - rest) / 60.0
                tell(f"{run.directory}: {self._verdict(row)}; {len(left)} left, about {_time(minutes)}")
                rows[run.directory] = row
                self._write(rows)
        return self._in_order(rows), failed

    def _in_order(self, rows: dict[Path, dict[str, Any]]) -> list[dict[str, Any]]:
        return [rows[run.directory] for run in self.runs if run.directory in rows]

    def _write(self, rows: dict[Path, dict[str, Any]]) -> None:
        if rows and self.path is not None:
            write_table(self.path, self._in_order(rows))


def _time(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


@contextlib.contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that start clean and do not outlive this one, however it ends."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent, initargs=(os.getpid(),))
    try:
        yield executor
    except BaseException:
        for process in list(executor._processes.values()):
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def in_worker(start: Callable[[C], object], config: C, directory: Path) -> None:
    """One run; what it prints goes into its directory."""
    os.environ["OMP_NUM_THREADS"] = "1"
    directory.mkdir(parents=True, exist_ok=True)
    log = (directory / "log.txt").open("w", buffering=1)
    with log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        start(config)

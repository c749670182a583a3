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
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_md.messages import tell
from megatron_md.processes import die_with_parent
from megatron_md.sweep.plan import SweepRun
from megatron_md.sweep.table import write_table

C = TypeVar("C")
LOG_NAME = "log.txt"
_PATIENCE = 30.0  # seconds for runs to save and end


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
        for run, error in in_processes(self._start, todo, workers):
            del left[run.directory]
            row = self._row(run) if error is None else None
            if row is None:
                failed += 1
                error = error or "it ended without figures"
                tell(f"{run.directory} failed: {error} (see {run.directory / LOG_NAME})")
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


def in_processes(
    start: Callable[[C], object], runs: Sequence[SweepRun[C]], workers: int
) -> Iterator[tuple[SweepRun[C], str | None]]:
    """Do runs in processes of their own, so many at a time; none outlives this one, however it ends.

    Args:
        start: does one run.
        runs: in the order in which they are begun.
        workers: processes at a time.

    Yields:
        Each run as it ends, and what went wrong in one line, or None.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(runs))
    running: dict[Any, tuple[Any, Connection, SweepRun[C]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                run = waiting.pop()
                result, sender = context.Pipe(duplex=False)
                words = start, run.config, run.directory, os.getpid(), sender
                process = context.Process(target=_in_worker, args=words)
                process.start()
                sender.close()
                running[process.sentinel] = process, result, run
            for sentinel in wait(list(running)):
                process, result, run = running.pop(sentinel)
                process.join()
                yield run, _outcome(result, process.exitcode)
    finally:
        end = time.monotonic() + _PATIENCE
        for process, _, _ in running.values():
            process.terminate()  # a run that is asked to stop saves
        for process, _, _ in running.values():
            process.join(max(0.0, end - time.monotonic()))
            process.kill()


def _outcome(result: Connection, code: int | None) -> str | None:
    try:
        error: str | None = result.recv()
        return error
    except EOFError:
        return f"its process died with exit code {code}"


def _in_worker(start: Callable[[C], object], config: C, directory: Path, parent: int, result: Connection) -> None:
    """One run; what it prints goes into its directory."""
    die_with_parent(parent)
    os.setsid()  # Ctrl-C at a terminal reaches the parent alone, which asks its runs to stop: two would lose them
    # Many processes share the machine: no threads, and no compiler with processes of its own, in each of them.
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        log = (directory / LOG_NAME).open("w", buffering=1)
        with log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
            try:
                start(config)
            except BaseException:
                traceback.print_exc()
                raise
        result.send(None)
    except BaseException as error:
        with contextlib.suppress(BrokenPipeError):  # the sweep may have ended meanwhile; the log says why
            result.send(f"{type(error).__name__}: {error}")

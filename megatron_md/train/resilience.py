"""Stopping on request: a signal or the file RUN/stop; all ranks agree on it after a step, the run saves and ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_md import run_files

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
NAMES = (f"the file {run_files.STOP}", *(number.name for number in SIGNALS))


class StopRequest:
    """Remembers the first SIGTERM, SIGINT or SIGUSR1, and looks for RUN/stop; a second signal ends the process at once.

    The file is removed when it is honoured, so that the next start does not stop again.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        """Handle the signals from here on.

        Args:
            run_dir: the run's directory, on the one rank that looks for the file.
        """
        self.file = run_dir / run_files.STOP if run_dir is not None else None
        self.signal: int | None = None
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # print() is not safe here: the signal may have interrupted one.
            os.write(2, b"megatron-md: a second signal: ended at once, nothing is saved\n")
            os._exit(128 + number)
        self.signal = number

    def votes(self) -> list[float]:
        """What this process has been asked by: 1 for the file or the signal, in the order of `NAMES`."""
        is_there = self.file is not None and self.file.exists()
        return [float(is_there), *(float(self.signal == number) for number in SIGNALS)]

    def verdict(self, votes: Sequence[float]) -> str | None:
        """What asked any of the ranks to stop, from the sums of their votes; every rank stops for it."""
        asked = next((name for name, count in zip(NAMES, votes, strict=True) if count), None)
        if asked == NAMES[0] and self.file is not None:
            self.file.unlink(missing_ok=True)
        return asked

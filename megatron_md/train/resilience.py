"""Stopping on request: a signal or the file RUN/stop; all ranks agree on it after a step, the run saves and ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_FILE = "stop"
_FILE = 1000  # above every signal's number


class StopRequest:
    """Remembers the first SIGTERM, SIGINT or SIGUSR1, and looks for RUN/stop; a second signal ends the process at once.

    The file is removed when it is honoured, so that the next start does not stop again.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        """Handle the signals from here on.

        Args:
            run_dir: the run's directory, on the one rank that looks for the file.
        """
        self.file = run_dir / STOP_FILE if run_dir is not None else None
        self.signal: int | None = None
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # print() is not safe here: the signal may have interrupted one.
            os.write(2, b"megatron-md: a second signal: ended at once, nothing is saved\n")
            os._exit(128 + number)
        self.signal = number

    def agreed(self, device: torch.device) -> str | None:
        """What asked any of the ranks to stop, the same on all of them; every rank calls this after each step."""
        found = _FILE if self.file is not None and self.file.exists() else self.signal or 0
        flag = torch.tensor([float(found)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        number = int(flag.item())
        if number == _FILE:
            if self.file is not None:
                self.file.unlink(missing_ok=True)
            return f"the file {STOP_FILE}"
        return signal.Signals(number).name if number else None

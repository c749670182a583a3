"""Stopping on request: signals set a flag, all ranks agree on it after a step, the run saves and ends."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from types import FrameType

import torch
import torch.distributed as dist

EXIT_DONE, EXIT_ERROR, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 75

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Watchdog:
    """Ends this process, its Python stacks printed, when nothing has happened for too long.

    A rank that hangs makes its peers wait in a collective, so all ranks print where they stand at about the same time.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def alive(self) -> None:
        """Something has been done: start waiting anew."""
        # pytest and the like replace sys.stderr by objects without a file descriptor.
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__ or 2)

    def stop(self) -> None:
        """Wait no longer."""
        faulthandler.cancel_dump_traceback_later()


class StopRequest:
    """Remembers the first SIGTERM, SIGINT or SIGUSR1; the second one ends the process at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            os._exit(128 + number)
        self.signal_name = signal.Signals(number).name

    def agreed(self, device: torch.device) -> bool:
        """True on all ranks once any of them has been asked to stop; every rank calls this after each step."""
        flag = torch.tensor([float(self.signal_name is not None)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

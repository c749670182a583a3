"""Stopping on request: signals set a flag, all ranks agree on it after a step, the run saves and ends."""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

EXIT_DONE, EXIT_ERROR, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 75

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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

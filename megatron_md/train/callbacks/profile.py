"""A window of steps recorded by torch.profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_md.config import ProfileConfig
from megatron_md.train.callback import Callback, StepResult
from megatron_md.train.trainer import Trainer


class Profiler(Callback):
    """Writes RUN/profile/rank_N.json (open it in Perfetto) and a table of the costliest operators beside it."""

    def __init__(self, keys: ProfileConfig, run_dir: Path) -> None:
        self.keys = keys
        self.directory = run_dir / "profile"
        self._profiler: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Start at once where the window opens with this process's first step."""
        self._start_if_due(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Stop behind the window's last step; start before its first."""
        if self._profiler is not None and trainer.progress.step >= self.keys.start + self.keys.steps:
            self._stop(trainer)
        self._start_if_due(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Write a window that the end of the run has cut short."""
        if self._profiler is not None:
            self._stop(trainer)

    def _start_if_due(self, trainer: Trainer) -> None:
        if self.keys.steps and trainer.progress.step == self.keys.start:
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def _stop(self, trainer: Trainer) -> None:
        self._profiler.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        base = self.directory / f"rank_{trainer.world.rank}"
        self._profiler.export_chrome_trace(str(base.with_suffix(".json")))
        key = "self_cuda_time_total" if trainer.world.device.type == "cuda" else "self_cpu_time_total"
        table = self._profiler.key_averages().table(sort_by=key, row_limit=40)
        base.with_suffix(".txt").write_text(table)
        self._profiler = None

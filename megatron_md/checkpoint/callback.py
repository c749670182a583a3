"""Saving during a run."""

from __future__ import annotations

import time

from megatron_md.checkpoint.manager import CheckpointManager
from megatron_md.train.callback import Callback, Record
from megatron_md.train.metrics import MetricsWriter, append_event
from megatron_md.train.trainer import Trainer


class Checkpointing(Callback):
    """Saves every `checkpoint.every_steps` steps, at the end, and when the run is asked to stop."""

    def __init__(self, manager: CheckpointManager, *, every_steps: int, metrics: MetricsWriter) -> None:
        self.manager = manager
        self.every = every_steps
        self.metrics = metrics
        self.saved_step: int | None = None

    def on_start(self, trainer: Trainer) -> None:
        """A run that has just been resumed stands saved already."""
        if trainer.progress.step:
            self.saved_step = trainer.progress.step

    def after_step(self, trainer: Trainer, record: Record) -> None:
        """Save where it is due."""
        if self.every and trainer.progress.step % self.every == 0:
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Save what the last interval left over."""
        if self.saved_step != trainer.progress.step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint of where the run stands."""
        start = time.perf_counter()
        path = self.manager.save(trainer.stepper.chunks, trainer.optimizer, trainer.progress)
        seconds = time.perf_counter() - start
        self.metrics.save_seconds += seconds
        self.saved_step = trainer.progress.step
        if trainer.world.is_main:
            append_event(self.manager.run_dir, "saved", step=trainer.progress.step, path=path.name, seconds=seconds)

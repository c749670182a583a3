"""Saving during a run: when, in the background or not, and what a failed save means."""

from __future__ import annotations

import time

from megatron_md.checkpoint import replicas
from megatron_md.checkpoint.manager import CheckpointManager, PoisonedError, Saved
from megatron_md.checkpoint.writer import SaveError
from megatron_md.config import CheckpointConfig
from megatron_md.messages import tell
from megatron_md.train.callback import Callback, StepResult
from megatron_md.train.callbacks.metrics import MetricsWriter, append_event
from megatron_md.train.logs import logger
from megatron_md.train.trainer import Trainer


class Checkpointing(Callback):
    """Saves every so many steps and minutes, at the end, and when the run is asked to stop; only what is sound."""

    def __init__(self, manager: CheckpointManager, keys: CheckpointConfig, *, metrics: MetricsWriter) -> None:
        self.manager = manager
        self.keys = keys
        self.metrics = metrics
        self.saved_step: int | None = None
        self._newest_save = time.monotonic()
        self._nelbo: tuple[int, float] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """A run that has just been resumed stands saved already."""
        if trainer.progress.step:
            self.saved_step = trainer.progress.step
        self._newest_save = time.monotonic()

    def vote(self, trainer: Trainer) -> float:
        """Whether `checkpoint.every_minutes` have gone by, on rank 0's clock."""
        minutes = (time.monotonic() - self._newest_save) / 60.0
        return float(trainer.world.is_main and 0.0 < self.keys.every_minutes <= minutes)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Complete what has been written in the background; compare replicas and save where it is due.

        Raises:
            ReplicaError: on all ranks, if they hold different values of the same tensor.
            PoisonedError: on all ranks, if weights are not finite and the run must not return to a checkpoint.
            SaveError: on all ranks, if a save has failed and `checkpoint.on_error` is stop.
        """
        step = trainer.progress.step
        if "val_nelbo" in result.record:
            self._nelbo = step, result.record["val_nelbo"]
        self._finish(trainer, wait=False)
        every = self.keys.every_steps
        compare_every = trainer.config.train.check_replicas_every or 0
        if result.votes[id(self)] or (every and step % every == 0):
            self._save(trainer, in_background=self.keys.asynchronous)
        elif compare_every and step % compare_every == 0:
            self._compare(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Wait for what is being written, and save what the last interval left over.

        Raises:
            ReplicaError, PoisonedError: as `after_step`.
            SaveError: on all ranks, whatever `checkpoint.on_error` says: there is no later save to make up for it.
        """
        self._finish(trainer, wait=True)
        if self.saved_step != trainer.progress.step:
            self._save(trainer, in_background=False, is_last=True)

    def settle(self, trainer: Trainer) -> None:
        """Wait for what is being written, before the run returns to an earlier checkpoint.

        Raises:
            SaveError: as `after_step`.
        """
        self._finish(trainer, wait=True)

    def _compare(self, trainer: Trainer) -> None:
        try:
            replicas.compare(trainer.stepper.chunks, trainer.optimizer, trainer.progress.step)
        except replicas.ReplicaError:
            # What is being written was compared when its save began.
            self._finish(trainer, wait=True)
            raise

    def _save(self, trainer: Trainer, *, in_background: bool, is_last: bool = False) -> None:
        self._finish(trainer, wait=True)
        step = trainer.progress.step
        self._newest_save = time.monotonic()
        nelbo = self._nelbo[1] if self._nelbo is not None and self._nelbo[0] == step else None
        start = time.perf_counter()
        if trainer.config.train.check_replicas_every != 0:
            self._compare(trainer)
        try:
            self.manager.begin(
                trainer.stepper.chunks,
                trainer.optimizer,
                trainer.progress,
                val_nelbo=nelbo,
                in_background=in_background,
            )
        except PoisonedError as error:
            self._refused(trainer, error)
            return
        except SaveError as error:
            self._failed(trainer, error, is_last)
            return
        if in_background:
            self.metrics.save_seconds += time.perf_counter() - start
        else:
            self._finish(trainer, wait=True, is_last=is_last, since=start)

    def _finish(self, trainer: Trainer, *, wait: bool, is_last: bool = False, since: float | None = None) -> None:
        if not self.manager.is_writing:
            return
        start = time.perf_counter() if since is None else since
        try:
            saved = self.manager.finish() if wait else self.manager.finish_if_written()
        except SaveError as error:
            self._failed(trainer, error, is_last)
            return
        self.metrics.save_seconds += time.perf_counter() - start
        if saved is not None:
            self._saved(trainer, saved)

    def _saved(self, trainer: Trainer, saved: Saved) -> None:
        self.saved_step = saved.step
        if trainer.world.is_main:
            append_event(
                self.manager.run_dir,
                "saved",
                step=saved.step,
                path=saved.path.name,
                seconds=saved.total_seconds,
                stall_seconds=saved.stall_seconds,
            )

    def _refused(self, trainer: Trainer, error: PoisonedError) -> None:
        """The run returns to a checkpoint, or ends where it must not: it never trains on without saves."""
        logger.error("%s", error)
        if trainer.world.is_main:
            append_event(self.manager.run_dir, "save_refused", step=trainer.progress.step, error=str(error))
        if not trainer.can_roll_back:
            raise PoisonedError(f"{error}: no checkpoint of them is written, and train.max_skipped is 0") from error
        trainer.poisoned = str(error)

    def _failed(self, trainer: Trainer, error: SaveError, is_last: bool) -> None:
        logger.error("%s", error)
        goes_on = self.keys.on_error == "continue" and not is_last
        if trainer.world.is_main:
            append_event(self.manager.run_dir, "save_failed", step=trainer.progress.step, error=str(error))
            if goes_on:
                tell(f"{error}; training goes on without it (checkpoint.on_error: continue)")
        if not goes_on:
            raise error

"""The training loop: take a corrupted global batch, make an optimizer step, tell the callbacks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from megatron.core.optimizer import MegatronOptimizer

from megatron_md.batch import CorruptedBatch, DamagedDocument
from megatron_md.config import Config
from megatron_md.data.stream import Prefetcher, RowStream, micro_batches
from megatron_md.parallel import World
from megatron_md.train.callback import Callback, Record
from megatron_md.train.optimizer import learning_rate, set_hyperparameters
from megatron_md.train.progress import Progress, row_length_at
from megatron_md.train.resilience import StopRequest, Watchdog
from megatron_md.train.step import Stepper


@dataclass(frozen=True)
class PreparedBatch:
    """This rank's corrupted micro-batches of a global batch, and the damaged documents that left gaps in them."""

    micro_batches: list[CorruptedBatch]
    damaged: frozenset[DamagedDocument]


@dataclass
class Trainer:
    """Everything that a run consists of, and the loop over it.

    Attributes:
        progress: steps, samples and tokens done; set it before `fit` to continue from a checkpoint.
        stopped_by: name of the signal that ended the run early, else None.
        damaged: documents that left gaps in this rank's rows of the newest global batch.
    """

    config: Config
    world: World
    stream: RowStream
    stepper: Stepper
    optimizer: MegatronOptimizer
    callbacks: Sequence[Callback]
    stop_request: StopRequest | None = None
    progress: Progress = field(init=False)
    stopped_by: str | None = None
    damaged: frozenset[DamagedDocument] = frozenset()

    def __post_init__(self) -> None:
        self.progress = Progress.start(self.config)

    def fit(self) -> None:
        """Train until `train.steps` steps are done or a signal asks to stop."""
        watchdog = Watchdog(self.config.train.hang_timeout)
        for callback in self.callbacks:
            callback.on_start(self)
        try:
            self._loop(watchdog)
            for callback in self.callbacks:
                watchdog.alive()
                callback.on_end(self)
        finally:
            watchdog.stop()

    def _loop(self, watchdog: Watchdog) -> None:
        with closing(Prefetcher(self._global_batches(), depth=self.config.data.prefetch)) as batches:
            while self.progress.step < self.config.train.steps and self.stopped_by is None:
                watchdog.alive()
                record = self.train_step(batches)
                for callback in self.callbacks:
                    watchdog.alive()
                    callback.after_step(self, record)
                is_last = self.progress.step >= self.config.train.steps
                if self.stop_request is not None and not is_last and self.stop_request.agreed(self.world.device):
                    self.stopped_by = self.stop_request.signal_name or "another rank's signal"

    def train_step(self, batches: Iterator[PreparedBatch]) -> Record:
        """One optimizer step on the next global batch; returns its record."""
        start = time.perf_counter()
        batch = next(batches)
        fetched = time.perf_counter()
        keys = self.config.optimizer
        lr = learning_rate(keys, self.progress.step, self.config.train.steps)
        set_hyperparameters(self.optimizer, lr=lr, weight_decay=keys.weight_decay)
        report = self.stepper.train(batch.micro_batches)
        self.damaged = batch.damaged
        self.progress = self.progress.after(self.config)
        return {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": lr,
            **report.metrics,
            "step_seconds": time.perf_counter() - start,
            "data_seconds": fetched - start,
            "skipped": int(report.skipped),
        }

    def _global_batches(self) -> Iterator[PreparedBatch]:
        """This rank's part of every global batch from here to the end of the run."""
        progress = self.progress
        while progress.step < self.config.train.steps:
            position = progress.batch_position(self.config)
            rows = micro_batches(
                self.stream,
                position,
                self.config.train.micro_batch_size,
                data_rank=self.world.data_rank,
                data_size=self.world.data_size,
                length=row_length_at(self.config, progress.next_sample_index),
            )
            damaged = frozenset().union(*(batch.damaged for batch in rows))
            yield PreparedBatch(self.stepper.corrupt(rows), damaged)
            progress = progress.after(self.config)

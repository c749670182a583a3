"""The training loop: take a corrupted global batch, make an optimizer step, tell the callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from megatron.core.optimizer import MegatronOptimizer

from megatron_md.batch import CorruptedBatch, DamagedDocument
from megatron_md.config import Config
from megatron_md.data.shards import ShardError
from megatron_md.data.stream import Prefetcher, RowStream, micro_batches
from megatron_md.parallel import World
from megatron_md.train.callback import Callback, Record
from megatron_md.train.callbacks.watchdog import Watchdog
from megatron_md.train.optimizer import learning_rate, set_hyperparameters
from megatron_md.train.progress import Progress, row_length_at
from megatron_md.train.resilience import StopRequest
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
        stopped_by: the signal, file or callback that ended the run early, else None.
        watchdog: is told of every sign of life.
        roll_back: puts a checkpoint and its progress in place of the present state, or fails the run.
        damaged: documents that left gaps in this rank's rows of the newest global batch.
        fault: why the newest step's update was left out, else None.
        poisoned: why the present weights must go, whatever the losses say; a return to a checkpoint clears it.
        rows: [first, stop) of the newest global batch, in g.
    """

    config: Config
    world: World
    stream: RowStream
    stepper: Stepper
    optimizer: MegatronOptimizer
    callbacks: Sequence[Callback]
    stop_request: StopRequest | None = None
    watchdog: Watchdog | None = None
    roll_back: Callable[[], None] | None = None
    progress: Progress = field(init=False)
    stopped_by: str | None = None
    damaged: frozenset[DamagedDocument] = frozenset()
    fault: str | None = None
    poisoned: str | None = None
    rows: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.progress = Progress.start(self.config)

    def fit(self) -> None:
        """Train until `train.steps` steps are done or the run is asked to stop.

        Raises:
            BadNumbersError: on all ranks, when bad numbers come again and again.
        """
        self._alive()
        for callback in self.callbacks:
            callback.on_start(self)
        self._run()
        # The last save may have found weights that must not be saved.
        while self._must_roll_back():
            self._run()
        if self.watchdog is not None:
            self.watchdog.disarm()

    def _run(self) -> None:
        """From where the run stands to its end; one that ended right before its rollback begins with it."""
        while self._must_roll_back() or self._has_steps():
            if self._must_roll_back() and self.roll_back is not None:
                self._alive()
                self.roll_back()
                for callback in self.callbacks:
                    callback.on_rollback(self)
            self._run_steps()
        for callback in self.callbacks:
            self._alive()
            callback.on_end(self)

    def _run_steps(self) -> None:
        """Steps to the end of the run, to a stop, or to where a rollback is due."""
        with closing(Prefetcher(self._global_batches(), depth=self.config.data.prefetch)) as batches:
            while self._has_steps() and not self._must_roll_back():
                self._alive()
                record = self.train_step(batches)
                for callback in self.callbacks:
                    self._alive()
                    callback.after_step(self, record)
                # A callback may have ended the run already, on all ranks.
                is_open = self.stopped_by is None and self.progress.step < self.config.train.steps
                if self.stop_request is not None and is_open:
                    self.stopped_by = self.stop_request.agreed(self.world.device)

    @property
    def can_roll_back(self) -> bool:
        """Whether bad numbers may lead back to a checkpoint at all."""
        return self.roll_back is not None and self.config.train.max_skipped > 0

    def _has_steps(self) -> bool:
        return self.progress.step < self.config.train.steps and self.stopped_by is None

    def _must_roll_back(self) -> bool:
        most = self.config.train.max_skipped
        is_due = self.poisoned is not None or self.progress.guard.skipped_in_row >= most
        return self.can_roll_back and is_due

    def _alive(self) -> None:
        if self.watchdog is not None:
            self.watchdog.alive(self.progress.step)

    def train_step(self, batches: Iterator[PreparedBatch]) -> Record:
        """One optimizer step on the next global batch; returns its record."""
        start = time.perf_counter()
        batch = next(batches)
        fetched = time.perf_counter()
        keys = self.config.optimizer
        lr = learning_rate(keys, self.progress.step, self.config.train.steps)
        set_hyperparameters(self.optimizer, lr=lr, weight_decay=keys.weight_decay)
        progress, spike_factor = self.progress, self.config.train.spike_factor
        report = self.stepper.train(
            batch.micro_batches, lambda loss, grad_norm: progress.guard.fault(loss, grad_norm, spike_factor)
        )
        self.damaged = batch.damaged
        guard = progress.guard.after(
            report.loss, skipped=report.skipped, step=progress.step, first_row=progress.next_sample_index
        )
        self.progress = replace(progress.after(self.config), guard=guard)
        self.fault = report.fault
        position = progress.batch_position(self.config)
        self.rows = (position.first_sample_index, position.first_sample_index + position.global_batch_size)
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
            "skipped_total": guard.skipped_total,
        }

    def _global_batches(self) -> Iterator[PreparedBatch]:
        """This rank's part of every global batch from here to the end of the run."""
        progress = self.progress
        while progress.step < self.config.train.steps:
            position = progress.batch_position(self.config)
            try:
                rows = micro_batches(
                    self.stream,
                    position,
                    self.config.train.micro_batch_size,
                    data_rank=self.world.data_rank,
                    data_size=self.world.data_size,
                    length=row_length_at(self.config, progress.next_sample_index),
                )
            except ShardError as error:  # other ranks read other documents
                raise ShardError(f"rank {self.world.rank}: {error}") from error
            damaged = frozenset().union(*(batch.damaged for batch in rows))
            yield PreparedBatch(self.stepper.corrupt(rows), damaged)
            progress = progress.after(self.config)

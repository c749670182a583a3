"""The training loop: take a corrupted global batch, make an optimizer step, tell the callbacks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace

from megatron.core.optimizer import MegatronOptimizer

from megatron_md.batch import CorruptedBatch, DamagedDocument
from megatron_md.config import Config
from megatron_md.data.shards import ShardError
from megatron_md.data.stream import Prefetcher, RowStream, micro_batches
from megatron_md.model.dropout import seed_dropout
from megatron_md.parallel import World
from megatron_md.train.callback import Callback, StepResult
from megatron_md.train.optimizer import learning_rate, set_hyperparameters
from megatron_md.train.progress import Progress
from megatron_md.train.resilience import StopRequest
from megatron_md.train.step import Stepper


@dataclass(frozen=True)
class PreparedBatch:
    """This rank's corrupted micro-batches of a global batch, and the damaged documents that left gaps in them."""

    micro_batches: list[CorruptedBatch]
    damaged: frozenset[DamagedDocument]


@contextmanager
def _without_collector(is_wanted: bool) -> Iterator[None]:
    """Within it, Python collects garbage only when told to: a rank that pauses by itself holds up all others."""
    was_enabled = gc.isenabled()
    if is_wanted:
        gc.freeze()  # what is built by now stays, and need not be looked at again
        gc.disable()
    try:
        yield
    finally:
        if is_wanted:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


@dataclass
class Trainer:
    """The loop over a run, and what it consists of.

    Attributes:
        roll_back: puts a checkpoint and its progress in place of the present state, or fails the run.
        progress: steps, samples and tokens done; set it before `fit` to continue from a checkpoint.
        stopped_by: the signal, file or callback that ended the run early, else None.
        poisoned: why the present weights must go, whatever the losses say; a return to a checkpoint clears it.
    """

    config: Config
    world: World
    stream: RowStream
    stepper: Stepper
    optimizer: MegatronOptimizer
    callbacks: Sequence[Callback]
    stop_request: StopRequest | None = None
    roll_back: Callable[[Trainer], None] | None = None
    progress: Progress = field(init=False)
    stopped_by: str | None = None
    poisoned: str | None = None

    def __post_init__(self) -> None:
        self.progress = Progress.start(self.config, self.stream)

    def fit(self) -> None:
        """Train until `train.steps` steps are done or the run is asked to stop.

        Raises:
            BadNumbersError: on all ranks, when bad numbers come again and again.
        """
        for callback in self.callbacks:
            callback.on_start(self)
        with _without_collector(self.config.train.gc_every > 0):
            self._fit()

    def _fit(self) -> None:
        is_ended = False
        while not is_ended:
            # A run that ended right before its rollback begins with it.
            if self.roll_back is not None and self._must_roll_back():
                self.roll_back(self)
                for callback in self.callbacks:
                    callback.on_rollback(self)
            with closing(Prefetcher(self._global_batches(), depth=self.config.data.prefetch)) as batches:
                while self._has_steps() and not self._must_roll_back():
                    self._heed(self.train_step(batches))
            if not self._must_roll_back():
                for callback in self.callbacks:
                    callback.on_end(self)
                # The last save may have found weights that must not be saved.
                is_ended = not self._must_roll_back()

    def _heed(self, result: StepResult) -> None:
        """Tell the callbacks, and stop where any rank has been asked to."""
        for callback in self.callbacks:
            callback.after_step(self, result)
        every = self.config.train.gc_every
        if every and self.progress.step % every == 0:
            gc.collect()
        # A callback may have ended the run already, on all ranks.
        if self.stop_request is not None and self._has_steps():
            self.stopped_by = self.stop_request.verdict(result.stop_votes)

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

    def train_step(self, batches: Iterator[PreparedBatch]) -> StepResult:
        """One optimizer step on the next global batch."""
        start = time.perf_counter()
        batch = next(batches)
        fetched = time.perf_counter()
        progress, keys, spike_factor = self.progress, self.config.optimizer, self.config.train.spike_factor
        lr = learning_rate(keys, progress.step, self.config.train.steps)
        set_hyperparameters(self.optimizer, lr=lr, weight_decay=keys.weight_decay)
        stop_votes = self.stop_request.votes() if self.stop_request is not None else []
        votes = {id(callback): callback.vote(self) for callback in self.callbacks}
        if self.config.train.dropout or (self.config.lora is not None and self.config.lora.dropout):
            seed_dropout(self.config.seed, progress.next_sample_index, self.world.data_rank)
        report = self.stepper.train(
            batch.micro_batches,
            lambda loss, grad_norm: progress.guard.fault(loss, grad_norm, spike_factor),
            [float(len(batch.damaged)), *stop_votes, *votes.values()],
        )
        skipped, position = report.fault is not None, progress.batch_position(self.config)
        first = position.first_sample_index
        guard = progress.guard.after(report.loss, skipped=skipped, step=progress.step, first_row=first)
        self.progress = replace(progress.after(self.config, self.stream), guard=guard)
        record = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": lr,
            **report.metrics,
            "step_seconds": time.perf_counter() - start,
            "data_seconds": fetched - start,
            "skipped": int(skipped),
            "skipped_total": guard.skipped_total,
        }
        damaged, counted = report.votes[0], report.votes[1:]
        return StepResult(
            record=record,
            fault=report.fault,
            rows=(first, first + position.global_batch_size),
            damaged=batch.damaged,
            is_damaged=damaged > 0.0,
            stop_votes=counted[: len(stop_votes)],
            votes=dict(zip(votes, counted[len(stop_votes) :], strict=True)),
        )

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
                    length=progress.row_length(self.config, self.stream),
                )
            except ShardError as error:  # other ranks read other documents
                raise ShardError(f"rank {self.world.rank}: {error}") from error
            damaged = frozenset().union(*(batch.damaged for batch in rows))
            yield PreparedBatch(self.stepper.corrupt(rows), damaged)
            progress = progress.after(self.config, self.stream)

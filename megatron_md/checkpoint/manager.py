"""Saves and loads the state of a run. Every method is collective: all ranks call it at the same step.

One format serves all: it can be read on any layout (see `state`), is sealed by a manifest and verified before it is
opened (see `integrity`), and may be written while training goes on (see `writer`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_md import run_files
from megatron_md.checkpoint import directory as names
from megatron_md.checkpoint import state as states
from megatron_md.checkpoint.base import Base, refuse_adapters
from megatron_md.checkpoint.integrity import CheckpointError, verify
from megatron_md.checkpoint.writer import CheckpointWrite, SaveError, raise_together
from megatron_md.errors import UserError
from megatron_md.messages import tell
from megatron_md.model.build import settled_parameters
from megatron_md.together import on_main, together
from megatron_md.train import ema
from megatron_md.train.bad_numbers import BadNumbersError
from megatron_md.train.callbacks.metrics import append_event
from megatron_md.train.logs import logger
from megatron_md.train.optimizer import allocate_optimizer, set_optimizer_updates
from megatron_md.train.progress import Progress


class PoisonedError(BadNumbersError):
    """A number in weights or optimizer is not finite: such a state is never saved; raised on all ranks at once."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete.

    Attributes:
        path: its directory.
        step: of the training state that it holds.
        stall_seconds: for which training stood still.
        total_seconds: from the start of the save until it was complete.
    """

    path: Path
    step: int
    stall_seconds: float
    total_seconds: float


@dataclass
class _Pending:
    step: int
    write: CheckpointWrite
    started: float
    stall_seconds: float


class CheckpointManager:
    """Writes, prunes and reads the checkpoints of one run."""

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_last: int,
        keep_every: int = 0,
        keep_best: int = 0,
        resolved_config: str,
        identity: Callable[[int], dict[str, Any]] | None = None,
        texts: Mapping[str, Callable[[], str]] | None = None,
        base: Base | None = None,
    ) -> None:
        """Take charge of RUN/checkpoints; nothing is written yet.

        Args:
            run_dir: the run's directory.
            keep_last: newest checkpoints that are kept.
            keep_every: those at multiples of this many steps are kept as well; 0 keeps none for that reason.
            keep_best: so many with the lowest val_nelbo are kept as well.
            resolved_config: text of `config.yaml` in every checkpoint.
            identity: gives what a checkpoint at row g of the run must agree on to be resumed (JSON values by name):
                corpus and weights up to there, seed, model shape.
            texts: what else to keep in every checkpoint: file names, and what gives their content when it is saved.
            base: the checkpoint that the run's adapters belong to, if it trains adapters.
        """
        self.base = base
        self.identity = identity or (lambda next_sample_index: {})
        self.texts = texts or {}
        self.directory = run_dir / run_files.CHECKPOINTS
        self.run_dir = run_dir
        self.retention = names.Retention(keep_last, keep_every, keep_best)
        self.resolved_config = resolved_config
        self._pending: _Pending | None = None
        self._validated = False

    @property
    def is_writing(self) -> bool:
        """A save has begun and is not complete; the same on all ranks."""
        return self._pending is not None

    def save(
        self, chunks: list[Any], optimizer: MegatronOptimizer, progress: Progress, *, val_nelbo: float | None = None
    ) -> Saved:
        """Write a checkpoint and wait until it is complete.

        Args:
            chunks: model chunks.
            optimizer: over them.
            progress: where the run stands.
            val_nelbo: measured at this step, if it was.

        Raises:
            PoisonedError: a number in it is NaN or infinite; the checkpoints before it are as they were.
            SaveError: it could not be written; the same on all ranks. The checkpoints before it are as they were.
        """
        self.begin(chunks, optimizer, progress, val_nelbo=val_nelbo, in_background=False)
        saved = self.finish()
        assert saved is not None
        return saved

    def begin(
        self,
        chunks: list[Any],
        optimizer: MegatronOptimizer,
        progress: Progress,
        *,
        val_nelbo: float | None = None,
        in_background: bool = True,
    ) -> None:
        """Start to write a checkpoint: `finish`, or `finish_if_written` at a later step, completes it.

        Raises:
            PoisonedError: as `save`.
            SaveError: as `save`; also if an earlier save is still being written.
        """
        if self._pending is not None:
            raise SaveError("a save has begun before the one before it was finished")
        start = time.perf_counter()
        with settled_parameters(chunks):
            _refuse_poison(chunks, optimizer, progress.step)
            self._prepare(progress.step)
            state = states.model_state(chunks)
            state["optimizer"] = states.optimizer_state(optimizer, state)
            record = {
                "format": names.FORMAT_VERSION,
                "progress": asdict(progress),
                "layout": states.layout(),
                "optimizer": states.state_names(optimizer),
                "identity": self.identity(progress.next_sample_index),
                "val_nelbo": val_nelbo if val_nelbo is not None and math.isfinite(val_nelbo) else None,
                "base": self.base.record(self.directory) if self.base else None,
            }
            texts = {name: text() for name, text in self.texts.items()}
            texts |= {names.CONFIG_NAME: self.resolved_config, names.RECORD_NAME: json.dumps(record, indent=1)}
            partial = names.partial_path(self.directory, progress.step)
            write = CheckpointWrite(partial, state, texts, copy=in_background, validate=not self._validated)
        self._validated = True
        write.start(in_background=in_background)
        self._pending = _Pending(progress.step, write, start, time.perf_counter() - start)

    def _prepare(self, step: int) -> None:
        error: Exception | None = None
        if dist.get_rank() == 0:
            try:
                names.prepare(self.directory, step)
            except OSError as failure:
                error = failure
        raise_together(error)

    def finish_if_written(self) -> Saved | None:
        """Complete the save that has begun if all ranks have written their files; never waits for them.

        Raises:
            SaveError: as `save`.
        """
        if self._pending is None:
            return None
        return None if _on_any_rank(not self._pending.write.is_written) else self.finish()

    def finish(self) -> Saved | None:
        """Wait for the save that has begun and complete it; None if there is none.

        Raises:
            SaveError: as `save`.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        start = time.perf_counter()
        error: Exception | None = None
        path: Path | None = None
        try:
            pending.write.finish()
            if dist.get_rank() == 0:
                try:
                    path = names.publish(self.directory, pending.step, self.retention)
                except OSError as failure:
                    error = failure
            raise_together(error)
        except SaveError:
            if dist.get_rank() == 0:
                names.remove([names.partial_path(self.directory, pending.step)])
            raise
        now = time.perf_counter()
        path = path or self.directory / names.checkpoint_name(pending.step)
        return Saved(path, pending.step, pending.stall_seconds + now - start, now - pending.started)

    @torch.no_grad()
    def load_newest(self, chunks: list[Any], optimizer: MegatronOptimizer) -> tuple[Path, Progress] | None:
        """Read the newest checkpoint that is undamaged; damaged ones are named in a warning and in events.jsonl.

        Returns:
            The checkpoint and its progress; None if the run has no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and every one is damaged.
            UserError: as `load`.
        """
        self.finish()
        # Rank 0 lists, so that all ranks try the same ones.
        damages = []
        for checkpoint in on_main(lambda: names.complete_checkpoints(self.run_dir)):
            try:
                verify(checkpoint)
            except CheckpointError as error:
                damages.append(str(error))
                if dist.get_rank() == 0:
                    logger.warning("%s; the checkpoint before it is tried", error)
                    append_event(self.run_dir, "checkpoint_damaged", path=checkpoint.name, error=str(error))
                continue
            return checkpoint, self._load_verified(chunks, optimizer, checkpoint)
        if damages:
            raise CheckpointError(
                f"{self.directory}: every checkpoint is damaged ({damages[0]}): "
                "restore one, or remove them to start anew"
            )
        return None

    @torch.no_grad()
    def load(self, chunks: list[Any], optimizer: MegatronOptimizer, checkpoint: Path) -> Progress:
        """Verify a checkpoint and read it into model and optimizer.

        Raises:
            CheckpointError: it is damaged.
            UserError: it is incomplete, belongs to another run, or holds optimizer state of another kind.
        """
        self.finish()
        verify(checkpoint)
        return self._load_verified(chunks, optimizer, checkpoint)

    def _load_verified(self, chunks: list[Any], optimizer: MegatronOptimizer, checkpoint: Path) -> Progress:
        progress = names.read_progress(checkpoint)
        record = names.read_record(checkpoint)
        _refuse_differences(checkpoint, record["identity"], self.identity(progress.next_sample_index))
        allocate_optimizer(optimizer)
        needed = states.state_names(optimizer)
        _refuse_other_optimizer(checkpoint, record["optimizer"], needed)
        with settled_parameters(chunks):
            state = states.wanted_state(chunks)
            state["optimizer"] = states.optimizer_state(optimizer, state, only=record["optimizer"])
            loaded = states.read_state(state, checkpoint)
            states.load_model_state(chunks, loaded)
            set_optimizer_updates(optimizer, loaded["optimizer"]["updates"])
        if ema.NAME not in record["optimizer"]:
            ema.restart(optimizer)
        if dist.get_rank() == 0:
            _tell_of_average(checkpoint, record["optimizer"], needed)
        return progress

    @torch.no_grad()
    def load_model_only(self, chunks: list[Any], optimizer: MegatronOptimizer, checkpoint: Path) -> None:
        """Verify a checkpoint of another run and take its weights as the start of this one, or as its adapters' base.

        Raises:
            CheckpointError: it is damaged.
            UserError: its model has another shape, or another tokenizer, or it holds adapters only.
        """
        verify(checkpoint)
        record = names.read_record(checkpoint)
        refuse_adapters(checkpoint, record)
        there = record["identity"]
        # A converted checkpoint may come without a tokenizer.
        shared = {key for key in there if key.startswith(("model.", "tokenizer"))}
        here = {key: value for key, value in self.identity(0).items() if key in shared}
        _refuse_differences(checkpoint, there, here)
        with settled_parameters(chunks):
            load = states.load_base if states.has_adapters(chunks) else states.load_model
            load(chunks, checkpoint)
            # The optimizer's own fp32 parameters, which would undo the load at its first step.
            optimizer.reload_model_params()


def _on_any_rank(flag: bool) -> bool:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = torch.tensor([float(flag)], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def _refuse_poison(chunks: list[Any], optimizer: MegatronOptimizer, step: int) -> None:
    found = states.names_of_not_finite(chunks, optimizer)
    if not _on_any_rank(bool(found)):
        return
    by_rank = together(lambda: found)
    lines = [f"{tensors[0]} on rank {rank}" for rank, tensors in enumerate(by_rank) if tensors]
    count = sum(map(len, by_rank))
    raise PoisonedError(
        f"weights or optimizer state are not finite after step {step} ({', '.join(lines[:3])}; {count} tensors in all)"
    )


def _refuse_other_optimizer(checkpoint: Path, there: list[str], here: list[str]) -> None:
    if not there:
        raise UserError(
            f"{checkpoint}: holds weights and no optimizer state: start another run from it with checkpoint.load and "
            "checkpoint.load_only=model"
        )
    # A run may begin to average its weights, or stop doing so.
    if {*there} - {ema.NAME} != {*here} - {ema.NAME}:
        raise UserError(
            f"{checkpoint}: its optimizer state is {there}, this run's is {here}: put "
            "train.precision and megatron.optimizer back to what it was trained with"
        )


def _tell_of_average(checkpoint: Path, there: list[str], here: list[str]) -> None:
    if ema.NAME in here and ema.NAME not in there:
        tell(f"{checkpoint}: has no average of the weights: the run's (train.ema_decay) begins with its weights")
    if ema.NAME in there and ema.NAME not in here:
        tell(f"{checkpoint}: its average of the weights is not taken along: train.ema_decay is null")


def _refuse_differences(checkpoint: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    here = json.loads(json.dumps(here))
    lines = [f"{key}: {there.get(key)} there, {value} now" for key, value in here.items() if there.get(key) != value]
    if lines:
        raise UserError(
            f"{checkpoint} belongs to another run ({'; '.join(lines)}): "
            "choose another run_dir, or put these keys back to what it was trained with"
        )

"""The return to an earlier checkpoint after bad numbers, so that a crash at any moment leads to the same run.

RUN/rollback.json says which checkpoint the newest return led to and what the run leaves out since. It is on disk before
anything else changes; a start that finds a checkpoint which does not know of it yet carries the return out first.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron_md.checkpoint.directory import checkpoint_name, discard, is_complete, named_checkpoints, read_progress
from megatron_md.files import replace_file
from megatron_md.json_file import as_record, read_json
from megatron_md.train.bad_numbers import RECORD, BadNumbersError, Whole
from megatron_md.train.progress import Progress

FILE_NAME = "rollback.json"
_WAY_OUT = (
    "it is damaged: restore or remove it; without it the run goes on from its newest checkpoint, and returns again "
    "where it meets the bad numbers again"
)


@dataclass(frozen=True)
class Rollback:
    """A return to a checkpoint.

    Attributes:
        step: step of the checkpoint.
        number: how many there have been in the run, this one included.
        jumps: [first, stop) ranges of g that are left out from here on.
        skipped_total: updates left out in the run so far.
    """

    __pydantic_config__ = RECORD

    step: Whole
    number: Whole
    jumps: tuple[tuple[Whole, Whole], ...]
    skipped_total: Whole

    @classmethod
    def due(cls, run_dir: Path, progress: Progress, *, max_rollbacks: int) -> Rollback:
        """The return that `progress`, with its updates left out in a row, calls for.

        The checkpoint is the newest one of the step at which those began, or of an earlier one.

        Raises:
            BadNumbersError: there is no such checkpoint, or there have been enough returns.
        """
        guard = progress.guard
        rows = (guard.first_skipped_row, progress.next_sample_index)
        story = (
            f"bad numbers in {guard.skipped_in_row} steps in a row, from step {guard.first_skipped_step + 1} to "
            f"{progress.step} (rows {rows[0]} to {rows[1] - 1})"
        )
        events = f"{run_dir / 'events.jsonl'} lists the losses; look at those rows, or lower optimizer.lr"
        if guard.rollbacks >= max_rollbacks:
            raise BadNumbersError(
                f"{story}, after {guard.rollbacks} rollback(s), which is train.max_rollbacks: {events}"
            )
        steps = [step for step in _saved_steps(run_dir) if step <= guard.first_skipped_step]
        if not steps:
            raise BadNumbersError(f"{story}, and no checkpoint from before them to roll back to: {events}")
        return cls(max(steps), guard.rollbacks + 1, (*progress.jumps, rows), guard.skipped_total)

    @classmethod
    def read(cls, run_dir: Path) -> Rollback | None:
        """The newest return of a run, if there was one.

        Raises:
            ValueError: its file is damaged.
        """
        path = run_dir / FILE_NAME
        if not path.exists():
            return None
        return as_record(cls, read_json(path, _WAY_OUT), path, _WAY_OUT)

    def applied(self, progress: Progress) -> Progress:
        """A checkpoint's progress with this return in it; unchanged if it knows of it already."""
        if progress.guard.rollbacks >= self.number:
            return progress
        guard = replace(progress.guard, rollbacks=self.number, skipped_total=self.skipped_total, skipped_in_row=0)
        return replace(progress.with_jumps(self.jumps), guard=guard)

    def discard_newer(self, run_dir: Path) -> None:
        """Remove the checkpoints that the return leaves behind; on one rank, and harmless to repeat."""
        directory = run_dir / "checkpoints"
        newer = [path for step, path in named_checkpoints(directory).items() if step > self.step and is_complete(path)]
        stale = [path for path in newer if self._is_unknown_to(path)]
        if stale:
            replace_file(directory / "latest", checkpoint_name(self.step))
            discard(directory, stale)

    def _is_unknown_to(self, checkpoint: Path) -> bool:
        try:
            return read_progress(checkpoint).guard.rollbacks < self.number
        except ValueError:
            return False  # damaged: `verify` names it, and the one before it is taken


def agreed(run_dir: Path, progress: Progress, *, max_rollbacks: int) -> Rollback:
    """`Rollback.due`, decided by one rank, carried out on disk; every rank calls this.

    Raises:
        BadNumbersError: on all ranks, as `Rollback.due` says.
    """
    answer: list[Rollback | str] = [""]
    if dist.get_rank() == 0:
        try:
            rollback = Rollback.due(run_dir, progress, max_rollbacks=max_rollbacks)
            replace_file(run_dir / FILE_NAME, json.dumps(asdict(rollback)) + "\n")
            rollback.discard_newer(run_dir)
            answer = [rollback]
        except BadNumbersError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise BadNumbersError(answer[0])
    return answer[0]


def finish(run_dir: Path) -> Rollback | None:
    """The run's newest return, carried out on disk where a crash has kept it from that; every rank calls this.

    Raises:
        ValueError: on all ranks, as `Rollback.read` says.
    """
    answer: list[Rollback | str | None] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [_finished(run_dir)]
        except ValueError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise ValueError(answer[0])
    return answer[0]


def _finished(run_dir: Path) -> Rollback | None:
    rollback = Rollback.read(run_dir)
    if rollback is not None and not _saved_steps(run_dir):
        # The run begins anew.
        (run_dir / FILE_NAME).unlink()
        return None
    if rollback is not None:
        rollback.discard_newer(run_dir)
    return rollback


def _saved_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, newest first."""
    return [step for step, path in named_checkpoints(run_dir / "checkpoints").items() if is_complete(path)]

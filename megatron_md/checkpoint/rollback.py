"""The return to an earlier checkpoint after bad numbers, so that a crash at any moment leads to the same run.

RUN/rollback.json says which checkpoint the newest return led to and what the run leaves out since. It is on disk before
anything else changes; a start that finds a checkpoint which does not know of it yet carries the return out first.

The rows of the bad steps are blamed first. If no update is accepted after that either, the checkpoint is: it is set
aside, the run goes one further back and takes those rows up again. Should they turn out bad once more, they are left
out at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_md import run_files
from megatron_md.checkpoint.directory import (
    checkpoint_name,
    discard,
    is_complete,
    named_checkpoints,
    read_progress,
    set_aside_as_bad,
)
from megatron_md.files import replace_file
from megatron_md.json_file import as_record, read_json
from megatron_md.together import on_main
from megatron_md.train.bad_numbers import RECORD, BadNumbersError, Whole
from megatron_md.train.callbacks.metrics import append_event
from megatron_md.train.progress import Progress

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
        suspects: see `GuardState`.
        bad: step of a checkpoint that is set aside, as no update was accepted after the return to it.
        reason: why, in words.
    """

    __pydantic_config__ = RECORD

    step: Whole
    number: Whole
    jumps: tuple[tuple[Whole, Whole], ...]
    skipped_total: Whole
    suspects: tuple[Whole, Whole] = (0, 0)
    bad: Whole | None = None
    reason: str = ""

    @classmethod
    def due(cls, run_dir: Path, progress: Progress, *, max_rollbacks: int, poisoned: str | None = None) -> Rollback:
        """The return that `progress`, with its updates left out in a row, calls for, or weights that are poisoned.

        The checkpoint is the newest one of the step at which those began, or of an earlier one.

        Raises:
            BadNumbersError: there is no such checkpoint, or there have been enough returns.
        """
        guard = progress.guard
        last, rows = progress.step, (progress.next_sample_index, progress.next_sample_index)
        if guard.skipped_in_row:
            last, rows = guard.first_skipped_step, (guard.first_skipped_row, progress.next_sample_index)
        story = poisoned or (
            f"bad numbers in {guard.skipped_in_row} steps in a row, from step {guard.first_skipped_step + 1} to "
            f"{progress.step} (rows {rows[0]} to {rows[1] - 1})"
        )
        events = f"{run_dir / 'events.jsonl'} lists the losses; look at those rows, or lower optimizer.lr"
        if guard.rollbacks >= max_rollbacks:
            raise BadNumbersError(
                f"{story}, after {guard.rollbacks} rollback(s), which is train.max_rollbacks: {events}"
            )
        steps = [step for step in _saved_steps(run_dir) if step <= last]
        bad = None
        if not guard.is_proven and last in steps:
            bad, steps = last, steps[1:]
            story += f", and no update was accepted since the return to {checkpoint_name(bad)}"
        if not steps:
            raise BadNumbersError(f"{story}, and no checkpoint from before them to roll back to: {events}")
        jumps, suspects = _blamed(progress, rows, is_innocent=poisoned is not None)
        return cls(steps[0], guard.rollbacks + 1, jumps, guard.skipped_total, suspects, bad, story)

    @classmethod
    def read(cls, run_dir: Path) -> Rollback | None:
        """The newest return of a run, if there was one.

        Raises:
            UserError: its file is damaged.
        """
        path = run_dir / run_files.ROLLBACK
        if not path.exists():
            return None
        return as_record(cls, read_json(path, _WAY_OUT), path, _WAY_OUT)

    def applied(self, progress: Progress) -> Progress:
        """A checkpoint's progress with this return in it; unchanged if it knows of it already."""
        if progress.guard.rollbacks >= self.number:
            return progress
        guard = replace(
            progress.guard,
            rollbacks=self.number,
            skipped_total=self.skipped_total,
            skipped_in_row=0,
            is_proven=False,
            suspects=self.suspects,
        )
        return replace(progress.with_jumps(self.jumps), guard=guard)

    def discard_newer(self, run_dir: Path) -> None:
        """Remove the checkpoints that the return leaves behind, or set one aside; on one rank, harmless to repeat."""
        directory = run_dir / run_files.CHECKPOINTS
        newer = [path for step, path in named_checkpoints(directory).items() if step > self.step and is_complete(path)]
        stale = [path for path in newer if self._is_unknown_to(path)]
        if stale:
            replace_file(directory / run_files.LATEST, checkpoint_name(self.step))
            bad = [path for path in stale if self.bad is not None and path.name == checkpoint_name(self.bad)]
            for path in bad:
                aside = set_aside_as_bad(path)
                append_event(run_dir, "checkpoint_bad", path=aside.name, reason=self.reason)
            discard(directory, [path for path in stale if path not in bad])

    def _is_unknown_to(self, checkpoint: Path) -> bool:
        try:
            return read_progress(checkpoint).guard.rollbacks < self.number
        except ValueError:
            return False  # damaged: `verify` names it, and the one before it is taken


def _blamed(
    progress: Progress, rows: tuple[int, int], *, is_innocent: bool
) -> tuple[tuple[tuple[int, int], ...], tuple[int, int]]:
    """Jumps and suspects after a return from `rows`, whose updates were left out."""
    guard, jumps = progress.guard, progress.jumps
    suspects = guard.suspects
    if not guard.is_proven:
        # The checkpoint is blamed: the rows of this return and of the one before it come again.
        both = (suspects, rows) if suspects[0] < suspects[1] else (rows,)
        return tuple(jump for jump in jumps if jump != suspects), (min(r[0] for r in both), max(r[1] for r in both))
    if is_innocent:
        return jumps, suspects
    if suspects[0] <= rows[0] < suspects[1]:
        rows = (rows[0], max(rows[1], suspects[1]))
    return (*jumps, rows), rows


def agreed(run_dir: Path, progress: Progress, *, max_rollbacks: int, poisoned: str | None = None) -> Rollback:
    """`Rollback.due`, decided by one rank, carried out on disk; every rank calls this.

    Raises:
        BadNumbersError: on all ranks, as `Rollback.due` says.
    """

    def decide() -> Rollback:
        rollback = Rollback.due(run_dir, progress, max_rollbacks=max_rollbacks, poisoned=poisoned)
        replace_file(run_dir / run_files.ROLLBACK, json.dumps(asdict(rollback)) + "\n")
        rollback.discard_newer(run_dir)
        return rollback

    return on_main(decide)


def finish(run_dir: Path) -> Rollback | None:
    """The run's newest return, carried out on disk where a crash has kept it from that; every rank calls this.

    Raises:
        UserError: on all ranks, as `Rollback.read` says.
    """
    return on_main(lambda: _finished(run_dir))


def _finished(run_dir: Path) -> Rollback | None:
    rollback = Rollback.read(run_dir)
    if rollback is not None and not _saved_steps(run_dir):
        # The run begins anew.
        (run_dir / run_files.ROLLBACK).unlink()
        return None
    if rollback is not None:
        rollback.discard_newer(run_dir)
    return rollback


def _saved_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, newest first."""
    return [step for step, path in named_checkpoints(run_dir / run_files.CHECKPOINTS).items() if is_complete(path)]

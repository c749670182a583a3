"""Which checkpoints of a run are meant by `--last 4`, `--best 4` or `--steps 100,200`. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_md import run_files
from megatron_md.checkpoint.directory import is_complete, named_checkpoints, read_record
from megatron_md.errors import UserError


def select(run: Path, *, last: int | None = None, best: int | None = None, steps: Sequence[int] = ()) -> list[Path]:
    """Complete checkpoints of a run, oldest first: exactly one of the three says which.

    Args:
        run: run directory.
        last: so many of the newest.
        best: so many of those with the lowest recorded val_nelbo, the older of two that are equal.
        steps: those of these steps.

    Raises:
        UserError: the run has no checkpoint, or not those.
    """
    named = named_checkpoints(run / run_files.CHECKPOINTS)
    found = {step: path for step, path in sorted(named.items()) if is_complete(path)}
    if not found:
        raise UserError(f"{run}: not the directory of a run with a complete checkpoint")
    if steps:
        return [found[step] for step in _asked(run, steps, found)]
    if last is not None:
        return [found[step] for step in _most(run, list(reversed(found)), last, "complete", "checkpoint.keep_last")]
    assert best is not None, "one of the three is asked for"
    nelbos = {step: read_record(path)["val_nelbo"] for step, path in found.items()}
    measured = sorted((nelbo, step) for step, nelbo in nelbos.items() if nelbo is not None)
    ranked = [step for _, step in measured]
    return [found[step] for step in _most(run, ranked, best, "with a val_nelbo", "checkpoint.keep_best")]


def _asked(run: Path, steps: Sequence[int], found: dict[int, Path]) -> list[int]:
    missing = sorted(set(steps) - found.keys())
    if missing:
        raise UserError(f"{run}: has no complete checkpoint of step {missing[0]}; it has those of {_listed(found)}")
    if len(set(steps)) < len(steps):
        raise UserError(f"--steps {','.join(map(str, steps))}: one is there twice")
    return sorted(steps)


def _most(run: Path, ranked: list[int], count: int, kind: str, key: str) -> list[int]:
    if len(ranked) < count:
        there = f" (of steps {_listed(ranked)})" if ranked else ""
        raise UserError(
            f"{run}: {count} checkpoints {kind} are asked for, and it has {len(ranked)}{there}: ask for fewer, or "
            f"train with a larger {key}"
        )
    return sorted(ranked[:count])


def _listed(steps: Sequence[int] | dict[int, Path]) -> str:
    """The steps in words, the newest ten of many."""
    ordered = sorted(steps)
    return ("..., " if len(ordered) > 10 else "") + ", ".join(map(str, ordered[-10:]))

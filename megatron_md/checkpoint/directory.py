"""RUN/checkpoints: names, what is complete, what is kept.

step_00000100/ is complete or absent: it is written under a temporary name, sealed by `manifest.json` and renamed;
`latest` names the newest one. Names that start with a dot are being written or removed, or are what a crash has left.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_md import run_files
from megatron_md.checkpoint.integrity import MANIFEST_NAME
from megatron_md.errors import UserError
from megatron_md.files import replace_file, sync
from megatron_md.json_file import as_record, read_json
from megatron_md.train.bad_numbers import GuardState
from megatron_md.train.progress import Progress

Weights = Literal["model", "ema"]
# How the names of the tensors begin that the optimizer keeps of a weight, whose own name follows.
AVERAGE, FP32_WEIGHTS = "optimizer.state.ema.", "optimizer.state.fp32_param."
FORMAT_VERSION = 2
RECORD_NAME, CONFIG_NAME = "progress.json", run_files.CONFIG
_KINDS = {
    "format": int,
    "progress": dict,
    "identity": dict,
    "layout": dict,
    "optimizer": list,
    "val_nelbo": float | None,
    "base": dict | None,
}
_DEFAULTS: dict[str, Any] = {"identity": {}, "layout": {}, "optimizer": [], "val_nelbo": None, "base": None}
_WAY_OUT = "restore it, or remove the directory to go on from the one before"
BAD_SUFFIX = ".bad"
_WRITING, _REMOVING = ".writing_", ".removing_"
_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint at `step`."""
    return f"step_{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """True for what `checkpoint_name` gives; a user's copy, `step_00000100.bak`, is neither taken nor removed."""
    return _NAME.fullmatch(name) is not None


def named_checkpoints(directory: Path) -> dict[int, Path]:
    """What bears a checkpoint's name in RUN/checkpoints, complete or not, by step, newest first."""
    found = (path for path in directory.glob("step_*") if is_checkpoint_name(path.name))
    return dict(sorted(((int(path.name.removeprefix("step_")), path) for path in found), reverse=True))


def set_aside_as_bad(checkpoint: Path) -> Path:
    """Rename a checkpoint so that the run never takes, counts or removes it again; a path still names it."""
    base = f"{checkpoint.name}{BAD_SUFFIX}"
    free = (base if number == 1 else f"{base}{number}" for number in itertools.count(1))
    aside = next(path for path in map(checkpoint.with_name, free) if not path.exists())
    os.rename(checkpoint, aside)
    sync(checkpoint.parent)
    return aside


def is_bad(checkpoint: Path) -> bool:
    """True for what `set_aside_as_bad` has named."""
    name, suffix, number = checkpoint.name.rpartition(BAD_SUFFIX)
    return bool(suffix) and is_checkpoint_name(name) and (not number or number.isdecimal())


def is_complete(checkpoint: Path) -> bool:
    """True if the directory was finished; whether its files are as they were written, `verify` tells."""
    return (checkpoint / MANIFEST_NAME).is_file() and (checkpoint / RECORD_NAME).is_file()


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run: the one that `latest` names first, then the others, newest first.

    Raises:
        UserError: there are checkpoint directories, and none is complete.
    """
    directory = run_dir / run_files.CHECKPOINTS
    found, latest = named_checkpoints(directory), _latest(directory)
    complete = [path for path in sorted(found.values(), key=lambda path: path.name != latest) if is_complete(path)]
    if found and not complete:
        raise UserError(f"{directory}: none of its {len(found)} checkpoints is complete; remove them to start anew")
    return complete


def _latest(directory: Path) -> str:
    """The name in `latest`, which a user may have edited; one that is unreadable, or not there, names nothing."""
    pointer = directory / run_files.LATEST
    return pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run: the one that `latest` names or, if it is gone, the newest there is.

    Raises:
        UserError: there are checkpoint directories, and none is complete.
    """
    return next(iter(complete_checkpoints(run_dir)), None)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: a checkpoint directory itself, or the newest one of a run.

    Raises:
        UserError: it is neither.
    """
    checkpoint = path if is_complete(path) else latest_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path}: neither a run directory with a complete checkpoint nor a checkpoint")
    return checkpoint


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint records about itself: progress, layout, identity, optimizer, val_nelbo, base.

    Raises:
        UserError: the directory is not a complete checkpoint of this format.
    """
    path = checkpoint / RECORD_NAME
    record = {**_DEFAULTS, **read_json(path, f"not a complete checkpoint: {_WAY_OUT}")}
    for key, kind in _KINDS.items():
        if not isinstance(record.get(key), kind):
            raise UserError(f"{path}: {key} is missing or of a wrong type: not a complete checkpoint: {_WAY_OUT}")
    if record["format"] != FORMAT_VERSION:
        raise UserError(f"{path}: format {record['format']} is not {FORMAT_VERSION}, which this version reads")
    return record


def check_weights(checkpoint: Path, weights: Weights) -> None:
    """Check that a checkpoint has the weights that are asked for.

    Raises:
        UserError: it has no average of them.
    """
    if weights == "ema" and "ema" not in read_record(checkpoint)["optimizer"]:
        raise UserError(
            f"{checkpoint}: has no average of the weights (train.ema_decay keeps one); take the weights, model"
        )


def read_progress(checkpoint: Path) -> Progress:
    """The progress recorded in a checkpoint.

    Raises:
        UserError: the directory is not a complete checkpoint of this format.
    """
    where = f"{checkpoint / RECORD_NAME}: progress"
    return as_record(Progress, read_record(checkpoint)["progress"], where, f"not a complete checkpoint: {_WAY_OUT}")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay; the one that `latest` names always does.

    Attributes:
        last: the newest ones, by number; at least 1.
        every: those at multiples of this many steps; 0 keeps none for that reason.
        best: those with the lowest recorded val_nelbo, by number.
    """

    last: int
    every: int = 0
    best: int = 0

    def kept(self, nelbo_by_step: dict[int, float | None]) -> set[int]:
        """Steps of the checkpoints that stay.

        Args:
            nelbo_by_step: the val_nelbo measured at each checkpoint's step, None where nothing was measured.
        """
        steps = sorted(nelbo_by_step)
        measured = [(nelbo, step) for step, nelbo in nelbo_by_step.items() if nelbo is not None]
        keep = {*steps[-self.last :], *(step for _, step in sorted(measured)[: self.best])}
        if self.every:
            keep |= {step for step in steps if step % self.every == 0}
        return keep


def prepare(directory: Path, step: int) -> Path:
    """Make the empty directory that a checkpoint is written to; removes what crashes have left."""
    if directory.is_dir():
        remove(path for path in directory.iterdir() if path.name.startswith((_WRITING, _REMOVING)))
    partial = partial_path(directory, step)
    partial.mkdir(parents=True)
    return partial


def partial_path(directory: Path, step: int) -> Path:
    """Where the checkpoint at `step` is written."""
    return directory / f"{_WRITING}{checkpoint_name(step)}"


def publish(directory: Path, step: int, retention: Retention) -> Path:
    """Give a sealed checkpoint its name, point `latest` at it and remove what need not stay.

    Returns:
        Its directory.
    """
    target = directory / checkpoint_name(step)
    if target.exists():
        _set_aside(target)
    os.rename(partial_path(directory, step), target)
    sync(directory)
    replace_file(directory / run_files.LATEST, target.name)
    _prune(directory, retention)
    return target


def _set_aside(path: Path) -> Path:
    """Rename before a removal: a removal that is cut short must not leave half a checkpoint under its name."""
    aside = path.with_name(f"{_REMOVING}{path.name}")
    remove([aside])
    os.rename(path, aside)
    return aside


def remove(paths: Iterable[Path]) -> None:
    """Remove directories; what cannot be removed stays for the next attempt."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def discard(directory: Path, checkpoints: Iterable[Path]) -> None:
    """Remove checkpoints of a directory, and what earlier removals have left."""
    for path in checkpoints:
        _set_aside(path)
    sync(directory)
    remove(directory.glob(f"{_REMOVING}*"))


def _prune(directory: Path, retention: Retention) -> None:
    found: dict[int, tuple[Path, float | None]] = {}
    guards: dict[int, GuardState] = {}
    for step, path in named_checkpoints(directory).items():
        if is_complete(path):
            try:
                progress, nelbo = read_progress(path), read_record(path).get("val_nelbo")
            except ValueError:
                continue  # not ours to judge: verify names it when it is read
            found[step], guards[step] = (path, nelbo), progress.guard
    keep = retention.kept({step: nelbo for step, (_, nelbo) in found.items()})
    newest = _latest(directory)
    guard = next((guards[step] for step, (path, _) in found.items() if path.name == newest), GuardState())
    if guard.skipped_in_row:
        # If the next updates are left out too, the run returns to here; and if that does not help, one further back.
        keep |= {*sorted(step for step in found if step <= guard.first_skipped_step)[-2:]}
    discard(directory, [path for step, (path, _) in found.items() if step not in keep and path.name != newest])

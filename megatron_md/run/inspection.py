"""What a run or a checkpoint holds and in what state it is, from its JSON and YAML files alone.

Nothing is unpickled, imported or run, and torch is not needed: a foreign directory can be looked at.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_md import run_files
from megatron_md.checkpoint.base import recorded_base
from megatron_md.checkpoint.contract import config_changes, effect, model_identity
from megatron_md.checkpoint.directory import CONFIG_NAME, RECORD_NAME, is_bad, is_checkpoint_name
from megatron_md.checkpoint.integrity import MANIFEST_NAME, verify, verify_listing
from megatron_md.config import load_config, load_resolved, resolve, to_yaml
from megatron_md.config.loader import read_yaml
from megatron_md.errors import UserError
from megatron_md.json_file import LARGE, as_record, parse_json, read_json, read_regular
from megatron_md.train.records import Line, damage, read_lines

Changes = dict[str, list[Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class _Progress:
    step: int
    tokens: int
    total_tokens: int


@dataclass(frozen=True)
class _Record:
    """What is shown of `progress.json`, of whatever format."""

    format: int
    progress: _Progress
    layout: dict[str, int]
    base: dict[str, str] | None = None


@dataclass
class CheckpointSummary:
    """What one checkpoint says about itself.

    Attributes:
        path: its directory.
        state: complete, unsealed (no manifest), damaged, or bad (set aside: no update was accepted after it).
        problem: what is wrong with it, if anything.
        step: optimizer steps done.
        tokens: tokens served.
        total_tokens: tokens of the whole run.
        saved: when it was completed, in seconds since 1970.
        bytes: size of its files.
        format: version of the directory's format.
        layout: parallel sizes that wrote it.
        base: the checkpoint whose weights its adapters belong to, if it holds adapters.
        is_latest: `latest` names it.
        config_changes: keys in which RUN/config.yaml differs from its config: [there, now].
    """

    path: str
    state: str = "complete"
    problem: str | None = None
    step: int | None = None
    tokens: int | None = None
    total_tokens: int | None = None
    saved: float | None = None
    bytes: int = 0
    format: int | None = None
    layout: dict[str, int] = field(default_factory=dict)
    base: str | None = None
    is_latest: bool = False
    config_changes: Changes = field(default_factory=dict)


@dataclass
class Inspection:
    """What `inspect` has found.

    Attributes:
        path: the run or checkpoint directory.
        status: RUN/summary.json.
        last_event: last whole line of RUN/events.jsonl.
        environment: RUN/env.json.
        total_steps: steps that its config asks for.
        checkpoints: oldest first.
        unfinished: directories of saves or removals that were cut short.
        refused, depends, harmless: keys of `--against` that differ from the newest checkpoint's: [there, now].
        notes: files of the run, or lines of them, that could not be read.
    """

    path: str
    status: dict[str, Any] = field(default_factory=dict)
    last_event: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    total_steps: int | None = None
    checkpoints: list[CheckpointSummary] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    refused: Changes = field(default_factory=dict)
    depends: Changes = field(default_factory=dict)
    harmless: Changes = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def inspect(path: Path, *, verified: bool = False) -> Inspection:
    """Look at a run or a checkpoint directory.

    Args:
        path: the directory.
        verified: read every file of every checkpoint and compare hashes, not only names and sizes.

    Raises:
        UserError: it is neither.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    found = Inspection(str(path))
    if _is_checkpoint(path):
        found.checkpoints = [_summarise(path, verified)]
        found.total_steps = _noted(found.notes, _total_steps, path / run_files.CONFIG, None)
        return found
    directory = path / run_files.CHECKPOINTS
    if not directory.is_dir() and not (path / run_files.CONFIG).is_file():
        raise UserError(f"{path}: neither a run (no config.yaml, no checkpoints/) nor a checkpoint (no progress.json)")
    found.status = _noted(found.notes, _json, path / run_files.SUMMARY, {})
    if is_killed(path, found.status):
        found.notes.append("no job on this machine holds the run: it was killed, unless it runs on another machine")
    found.environment = _noted(found.notes, _json, path / run_files.ENVIRONMENT, {})
    found.total_steps = _noted(found.notes, _total_steps, path / run_files.CONFIG, None)
    latest = _noted(found.notes, _text, directory / run_files.LATEST, "").strip()
    for entry in sorted(directory.iterdir()) if directory.is_dir() else []:
        if entry.is_dir() and entry.name.startswith("."):
            found.unfinished.append(entry.name)
        elif entry.is_dir() and not is_checkpoint_name(entry.name) and not is_bad(entry):
            found.notes.append(f"{entry} is no checkpoint of the run by its name: it is neither resumed nor removed")
        elif entry.is_dir():
            summary = _summarise(entry, verified)
            summary.is_latest = entry.name == latest
            summary.config_changes = _changes(entry, path / run_files.CONFIG)
            found.checkpoints.append(summary)
    if latest and not any(checkpoint.is_latest for checkpoint in found.checkpoints):
        found.notes.append(f"{directory / 'latest'} names {latest!r}, which is not there")
    for name in (run_files.METRICS, run_files.SAMPLES):
        _records(path / name, "step", found.notes)
    found.last_event = next(reversed(_records(path / run_files.EVENTS, "event", found.notes)), {})
    return found


def compare_config(found: Inspection, config_path: Path) -> None:
    """Sort the keys in which a config differs from the newest checkpoint's into what resuming makes of them.

    Raises:
        UserError: there is no checkpoint to compare with, or no such config.
    """
    config = load_config(config_path)
    newest = newest_checkpoint(found)
    if newest is None:
        raise UserError(f"{found.path}: holds no checkpoint that {config_path} could resume")
    checkpoint = Path(newest.path)
    saved = load_resolved(checkpoint / CONFIG_NAME)
    there, here = model_identity(saved), model_identity(resolve(config, saved.model.vocab))
    differing = {key for key in here if there[key] != here[key]}
    for key, change in config_changes(checkpoint, to_yaml(config)).items():
        group = {"refused": found.refused, "depends": found.depends, "harmless": found.harmless}
        group[effect(key, change, differing)][key] = change


def newest_checkpoint(found: Inspection) -> CheckpointSummary | None:
    """The one that resuming would take: what `latest` names, else the last one that is not damaged."""
    usable = [checkpoint for checkpoint in found.checkpoints if checkpoint.state not in ("damaged", "bad")]
    return next((checkpoint for checkpoint in usable if checkpoint.is_latest), usable[-1] if usable else None)


def _is_checkpoint(path: Path) -> bool:
    return any((path / name).is_file() for name in (RECORD_NAME, MANIFEST_NAME, ".metadata"))


def _summarise(directory: Path, verified: bool) -> CheckpointSummary:
    summary = CheckpointSummary(str(directory))
    files = [path for path in directory.iterdir() if path.is_file() and not path.is_symlink()]
    summary.bytes = sum(path.stat().st_size for path in files)
    try:
        if not (directory / MANIFEST_NAME).exists():
            summary.state, summary.problem = "unsealed", f"no {MANIFEST_NAME}: it cannot be verified"
        elif verified:
            verify(directory)
        else:
            verify_listing(directory)
        path = directory / RECORD_NAME
        record = as_record(_Record, read_json(path, "restore it"), path, "restore it")
        summary.step, summary.tokens = record.progress.step, record.progress.tokens
        summary.total_tokens = record.progress.total_tokens
        summary.saved, summary.format, summary.layout = path.stat().st_mtime, record.format, record.layout
        if record.base is not None:
            summary.base = record.base.get("path")
            recorded_base(directory)
        if is_bad(directory):
            summary.state = "bad"
            summary.problem = "the run returned to it, and no update was accepted after that: never taken, nor removed"
    except (OSError, ValueError) as error:
        summary.state, summary.problem = "damaged", str(error).removeprefix(f"{directory}: ")
    return summary


def is_killed(run_dir: Path, summary: dict[str, Any]) -> bool:
    """Whether a run that says it is running has a lock that no job on this machine holds."""
    path = run_dir / run_files.LOCK
    if summary.get("status") != "running":
        return False
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _noted(notes: list[str], read: Callable[[Path], T], path: Path, otherwise: T) -> T:
    """What `read` finds; where the file cannot be read, a note says why."""
    try:
        return read(path)
    except (OSError, UnicodeDecodeError) as error:
        notes.append(f"{path} cannot be read ({error})")
    except ValueError as error:
        notes.append(str(error))
    return otherwise


def _text(path: Path) -> str:
    return read_regular(path, "restore it", most_bytes=LARGE).decode() if path.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    value = parse_json(text, path, "restore it") if text else {}
    return value if isinstance(value, dict) else {}


def _total_steps(path: Path) -> int | None:
    keys = read_yaml(path).get("train", {})
    steps = keys.get("steps") if isinstance(keys, dict) else None
    return steps if isinstance(steps, int) else None


def _records(path: Path, key: str, notes: list[str]) -> list[dict[str, Any]]:
    """The whole lines; a killed run may have left half of one behind them."""
    none: list[Line] = []
    lines = _noted(notes, lambda path: read_lines(path, key), path, none)
    if problem := damage(path, lines):
        notes.append(problem)
    return [line.record for line in lines if line.record is not None]


def _changes(checkpoint: Path, config: Path) -> Changes:
    """Keys in which a run's config differs from a checkpoint's; none where one of them cannot be read."""
    try:
        return config_changes(checkpoint, read_regular(config, "").decode())
    except ValueError:
        return {}

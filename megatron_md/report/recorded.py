"""What the files in a run's directory say, as far as they can be read: the run may go on, be killed, or be foreign.

Nothing is unpickled, imported or run, and torch is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_md import run_files
from megatron_md.checkpoint.contract import flat
from megatron_md.config import ResolvedConfig, load_resolved
from megatron_md.config.loader import read_yaml
from megatron_md.errors import UserError
from megatron_md.evaluate.plot import read_metrics
from megatron_md.run.inspection import Inspection, inspect, is_killed
from megatron_md.train.records import read_lines


@dataclass(frozen=True)
class Recorded:
    """A run as its files tell it.

    Attributes:
        path: its directory.
        name: what the page calls it.
        found: what `inspect` tells, with notes of what cannot be read.
        records: of metrics.jsonl.
        events: of events.jsonl.
        samples: of samples.jsonl.
        settings: of config.yaml, by dotted names.
        config: the same, if it is a run's of this version.
        is_killed: it says that it runs, and does not.
    """

    path: Path
    name: str
    found: Inspection
    records: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    settings: dict[str, Any]
    config: ResolvedConfig | None
    is_killed: bool

    @property
    def is_running(self) -> bool:
        """Whether more is to come."""
        return self.found.status.get("status") == "running" and not self.is_killed


def read_run(path: Path) -> Recorded:
    """Read a run's files; what cannot be read is noted and left out.

    Raises:
        UserError: it is no directory of a run.
    """
    found = inspect(path)
    if any(checkpoint.path == str(path) for checkpoint in found.checkpoints):
        raise UserError(f"{path}: a checkpoint; give the directory of its run")
    records: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    config = None
    # `inspect` has noted what it could not read; what it does not read itself is noted here.
    if (path / run_files.METRICS).is_file():
        try:
            records = read_metrics(path)
        except (OSError, ValueError) as error:
            found.notes.append(str(error))
    try:
        settings = flat(read_yaml(path / run_files.CONFIG))
        config = load_resolved(path / run_files.CONFIG)
    except (OSError, ValueError) as error:
        found.notes.append(str(error))
    return Recorded(
        path,
        str(path),
        found,
        records,
        _lines(path / run_files.EVENTS, "event"),
        _lines(path / run_files.SAMPLES, "step"),
        settings,
        config,
        is_killed(path, found.status),
    )


def read_runs(paths: Sequence[Path]) -> list[Recorded]:
    """Read several runs, which are called by what of their paths is not common to all.

    Raises:
        UserError: see `read_run`.
    """
    runs = [read_run(path) for path in paths]
    if len({path.absolute() for path in paths}) < 2:
        return runs
    common = os.path.commonpath([path.absolute() for path in paths])
    return [replace(run, name=os.path.relpath(run.path.absolute(), common)) for run in runs]


def _lines(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        return [line.record for line in read_lines(path, key) if line.record is not None]
    except OSError:  # noted by `inspect`
        return []

"""The checkpoint that adapters belong to: which one it was, by the hash of its weights, and where it lay.

A checkpoint of a LoRA run holds adapters only. Nothing here needs torch.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_md.checkpoint.directory import find_checkpoint, is_complete, read_record
from megatron_md.checkpoint.integrity import weights_digest
from megatron_md.errors import UserError
from megatron_md.json_file import as_record


@dataclass(frozen=True)
class Base:
    """A checkpoint with whole weights.

    Attributes:
        path: its directory.
        sha256: of its weights, as `weights_digest` gives it.
    """

    path: Path
    sha256: str

    def record(self, directory: Path) -> dict[str, str]:
        """What the adapters' checkpoints of RUN/checkpoints, `directory`, keep of it."""
        relative = os.path.relpath(self.path.resolve(), directory.resolve())
        return asdict(_Record(str(self.path.resolve()), relative, self.sha256))


@dataclass(frozen=True)
class _Record:
    """`base` in progress.json: its place, also as seen from RUN/checkpoints, and its hash."""

    path: str
    relative: str
    sha256: str


def open_base(source: Path) -> Base:
    """The checkpoint that a path means, as the base of adapters.

    Raises:
        UserError: there is none, or it holds adapters itself.
    """
    checkpoint = find_checkpoint(source)
    refuse_adapters(checkpoint, read_record(checkpoint))
    return Base(checkpoint, weights_digest(checkpoint))


def refuse_adapters(checkpoint: Path, record: dict[str, Any]) -> None:
    """Refuse a checkpoint of adapters where whole weights are wanted.

    Raises:
        UserError: it is one.
    """
    if record["base"] is not None:
        raise UserError(
            f"{checkpoint}: holds adapters only; merge them with their weights first: "
            f"megatron-md convert {checkpoint} RUN --to megatron"
        )


def recorded_base(checkpoint: Path) -> Base | None:
    """The base of a checkpoint of adapters; None for one with whole weights.

    Raises:
        UserError: it is not where it was, or not what it was.
    """
    entry = read_record(checkpoint)["base"]
    if entry is None:
        return None
    record = as_record(_Record, entry, f"{checkpoint}: base", "restore it")
    places = [Path(record.path), checkpoint.parent / record.relative]
    path = next((place for place in places if is_complete(place)), None)
    if path is None:
        raise UserError(
            f"{checkpoint}: holds adapters only, and the weights that they belong to are not at {record.path}: "
            "put that checkpoint back"
        )
    if weights_digest(path) != record.sha256:
        raise UserError(
            f"{path}: its weights are not those that the adapters of {checkpoint} were trained on "
            f"(sha256 {weights_digest(path)[:12]}, not {record.sha256[:12]}): restore it"
        )
    return Base(path, record.sha256)

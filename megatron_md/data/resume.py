"""What an interrupted build needs to go on: `progress.json`, written after every shard that is complete."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_md.data.entries import Dialogue, Document, Entry, TokenDocument
from megatron_md.data.shards import REJECTED_NAME, Count, Shard
from megatron_md.errors import UserError
from megatron_md.files import replace_file
from megatron_md.json_file import LARGE, as_record, read_json

PROGRESS_NAME = "progress.json"


@dataclass
class BuildProgress:
    """What a build has done so far; handed to `on_progress`."""

    documents: Count = 0
    tokens: Count = 0
    text_bytes: Count = 0
    answer_tokens: Count = 0
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass
class BuildState:
    """State of a build at the end of a shard.

    Attributes:
        key: hash of the settings that the bytes depend on.
        entries: entries of the corpus that are dealt with.
        fingerprint: checksum over them, in order.
        rejected_bytes: size of `rejected.jsonl`.
        progress: totals.
        shards: the complete shards.
    """

    key: str
    entries: Count = 0
    fingerprint: Count = 0
    rejected_bytes: Count = 0
    progress: BuildProgress = field(default_factory=BuildProgress)
    shards: list[Shard] = field(default_factory=list)

    def add(self, fingerprint: int) -> None:
        """Count an entry."""
        self.entries += 1
        self.fingerprint = zlib.crc32(fingerprint.to_bytes(4, "little"), self.fingerprint)

    def save(self, folder: Path) -> None:
        """Write it into the folder of the build, in one step."""
        content = {**vars(self), "progress": vars(self.progress), "shards": [asdict(shard) for shard in self.shards]}
        replace_file(folder / PROGRESS_NAME, json.dumps(content))


def load_state(folder: Path, key: str) -> BuildState | None:
    """State of the interrupted build in a folder, None where there is none; what came after it is removed.

    Raises:
        UserError: the folder holds an interrupted build with other settings, or its shards were changed.
    """
    file = folder / PROGRESS_NAME
    if not file.exists():
        return None
    way_out = f"delete {folder} to start over"
    state = as_record(BuildState, read_json(file, way_out, most_bytes=LARGE), file, way_out)
    if state.key != key:
        raise UserError(
            f"{folder}: holds an interrupted build with other settings or another tokenizer; finish that one first, "
            "or delete the folder to start over"
        )
    kept = {REJECTED_NAME, PROGRESS_NAME}
    for shard in state.shards:
        for name, size in ((shard.name, shard.bytes), (shard.index, None)):
            path = folder / name
            if not os.path.isfile(path) or size not in (None, path.stat().st_size):
                raise UserError(f"{path}: missing or changed since the build was interrupted; delete {folder}")
            kept.add(name)
    rejected = folder / REJECTED_NAME
    if not rejected.is_file() or rejected.stat().st_size < state.rejected_bytes:
        raise UserError(f"{rejected}: missing or cut since the build was interrupted; delete {folder}")
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    os.truncate(rejected, state.rejected_bytes)
    return state


def fingerprint(entry: Entry) -> int:
    """Checksum of an entry of a corpus."""
    checksum = zlib.crc32(entry.name.encode("utf-8", "surrogatepass"))
    if isinstance(entry, Document):
        return zlib.crc32(entry.text.encode("utf-8", "surrogatepass"), checksum)
    if isinstance(entry, TokenDocument):
        return zlib.crc32(entry.tokens.tobytes(), checksum)
    if isinstance(entry, Dialogue):
        content = json.dumps([entry.first_answer, *((turn.role, turn.content) for turn in entry.messages)])
        return zlib.crc32(content.encode(), checksum)
    return checksum


def skip_done(entries: Iterator[Entry], state: BuildState, folder: Path) -> None:
    """Read past the entries that an interrupted build has dealt with, and check that they are the same.

    Raises:
        UserError: the corpus has changed meanwhile.
    """
    again = BuildState(state.key)
    while again.entries < state.entries and (entry := next(entries, None)) is not None:
        again.add(fingerprint(entry))
    if (again.entries, again.fingerprint) != (state.entries, state.fingerprint):
        raise UserError(
            f"{folder}: the input has changed since the build was interrupted; delete the folder to start over"
        )

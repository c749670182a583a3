"""Checking of a whole corpus: every hash, every document, and for a damaged shard what is lost with it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_md.data.remote import RemoteError
from megatron_md.data.shards import INDEX_DTYPE, Manifest, Shard, ShardError, ShardReader
from megatron_md.data.tar import TarError, read_members


def verify(manifest: Manifest) -> list[str]:
    """Check every hash, every document's crc32 and every token id of a corpus.

    Returns:
        One line per problem, naming the file and the document; empty for a sound corpus.
    """
    problems: list[str] = []
    for number, shard in enumerate(manifest.shards):
        try:
            reader = ShardReader(manifest, number)
        except ShardError as error:
            problems.append(f"{error}{_lost(manifest, shard)}")
            continue
        except RemoteError as error:
            problems.append(str(error))
            continue
        with reader.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        damaged = _damaged_documents(reader, manifest.vocab_size)
        problems += damaged
        if sha256 != shard.sha256 and not damaged:
            problems.append(
                f"{reader.path}: damaged outside its documents (tar headers or lengths): its sha256 differs"
                f"{_structure(reader.path, reader.index)}"
            )
    return problems


def _damaged_documents(reader: ShardReader, vocab_size: int) -> list[str]:
    problems = []
    for number in range(len(reader.index)):
        try:
            tokens = reader.document(number)
        except ShardError as error:
            problems.append(str(error))
            continue
        if tokens.size and int(tokens.max()) >= vocab_size:
            problems.append(f"{reader.path}: document {number} holds a token outside the vocabulary of {vocab_size}")
    return problems


def _lost(manifest: Manifest, shard: Shard) -> str:
    """Which documents a shard of the wrong size lacks, as far as its index tells."""
    path, index_path = manifest.directory / shard.name, manifest.directory / shard.index
    if not path.is_file() or not index_path.is_file():
        return f"; all of its {shard.documents} documents are lost"
    data = index_path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        return ""
    index = np.load(io.BytesIO(data), allow_pickle=False)
    if index.dtype != INDEX_DTYPE or path.stat().st_size >= shard.bytes:
        return _structure(path, index)
    ends = index["offset"].astype(np.int64) + index["tokens"].astype(np.int64) * manifest.token_dtype.itemsize
    is_lost = ends > path.stat().st_size
    if not is_lost.any():
        return f"{_structure(path, index)}; no document is lost"
    first = int(np.argmax(is_lost))
    return f"; document {first} and {int(is_lost.sum()) - 1} after it are lost"


def _structure(path: Path, index: npt.NDArray[np.void]) -> str:
    """What the tar's structure says about the damage, with the documents that lie behind it."""
    try:
        with path.open("rb") as file:
            for _ in read_members(file, path):
                pass
    except TarError as error:
        behind = int(np.searchsorted(index["offset"], error.offset))
        place = f"before document {behind}" if behind < len(index) else f"after document {len(index) - 1}"
        return f"; {error.problem} at byte {error.offset}, {place}"
    return ""

"""Shards and their indexes: where each document lies in the tar, its checksum, in a chat corpus also its answers."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from megatron_md.data.answers import RUN_DTYPE

INDEX_DTYPE = np.dtype([("offset", "<u8"), ("tokens", "<u4"), ("crc32", "<u4")])
CHAT_INDEX_DTYPE = np.dtype(
    [*INDEX_DTYPE.descr, ("answers_offset", "<u8"), ("answer_runs", "<u4"), ("answers_crc32", "<u4")]
)
MAX_INDEX_HEADER = 1024
STRICT = ConfigDict(extra="forbid", strict=True)
Count = Annotated[int, Field(ge=0, lt=2**62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

Index = npt.NDArray[np.void]


@dataclass(frozen=True)
class Shard:
    """One shard of a manifest: file names relative to the manifest, sizes, hashes."""

    __pydantic_config__ = STRICT

    name: str
    documents: Annotated[Count, Field(gt=0)]
    tokens: Count
    bytes: Annotated[Count, Field(gt=0, multiple_of=512)]
    sha256: Sha256
    index: str
    index_sha256: Sha256


def parse_index(data: bytes, shard: Shard, dtype: np.dtype[Any], itemsize: int) -> Index | None:
    """The index in a file; None where it cannot be that of a shard.

    Documents lie in the order of the index, apart from each other, within the shard; so do the runs of their answers.

    Args:
        data: content of the file.
        shard: what it is the index of.
        dtype: `INDEX_DTYPE` or `CHAT_INDEX_DTYPE`.
        itemsize: bytes of a token.
    """
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        return None
    file = io.BytesIO(data)
    try:
        np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0(file, max_header_size=MAX_INDEX_HEADER)
    except Exception:  # a header is Python's syntax, and what is wrong in it is told in many ways
        return None
    if header != ((shard.documents,), False, dtype) or len(data) - file.tell() != shard.documents * dtype.itemsize:
        return None
    index = np.frombuffer(data, dtype, offset=file.tell())
    if not _lies_apart(index["offset"], index["tokens"], itemsize, shard.bytes):
        return None
    if dtype == CHAT_INDEX_DTYPE:
        runs = index["answer_runs"]
        # Runs are apart by a token at least.
        if (runs == 0).any() or (2 * runs.astype(np.int64) > index["tokens"].astype(np.int64) + 1).any():
            return None
        if not _lies_apart(index["answers_offset"], runs, RUN_DTYPE.itemsize, shard.bytes):
            return None
    return index if int(index["tokens"].sum(dtype=np.int64)) == shard.tokens else None


def _lies_apart(
    offsets: npt.NDArray[np.uint64], counts: npt.NDArray[np.uint32], itemsize: int, shard_bytes: int
) -> bool:
    if offsets.max() > shard_bytes or (offsets % min(itemsize, 4)).any():
        return False
    starts, ends = spans(offsets, counts, itemsize)
    return bool(ends[-1] <= shard_bytes and (starts[1:] >= ends[:-1]).all())


def spans(
    offsets: npt.NDArray[np.uint64], counts: npt.NDArray[np.uint32], itemsize: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """At which byte [documents] what belongs to each document begins and ends."""
    starts = offsets.astype(np.int64)
    return starts, starts + counts.astype(np.int64) * itemsize

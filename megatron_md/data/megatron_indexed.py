r"""Reader of Megatron's tokenised data sets: `NAME.bin` holds the tokens, `NAME.idx` says where documents begin.

The index, little-endian: 9 bytes `MMIDIDX\0\0`; uint64 version 1; uint8 code of the token type; uint64 number of
sequences S; uint64 number of document bounds D; int32 tokens [S]; int64 byte offsets [S]; int64 bounds [D], the
first sequence of each document followed by S (megatron-core's `IndexedDatasetBuilder` writes this).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_md.data.entries import InputError, TokenDocument

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def read_indexed(name: str, path: Path) -> Iterator[TokenDocument]:
    """Documents of a data set, given either of its two files.

    Raises:
        InputError: a file is missing, or the two contradict each other.
    """
    idx, bin = path.with_suffix(".idx"), path.with_suffix(".bin")
    for file in (idx, bin):
        if not file.is_file():
            raise InputError(f"{file}: no such file; a Megatron data set is a .bin and an .idx file", "missing file")
    dtype, lengths_S, offsets_S, bounds_D = _load_index(idx, bin.stat().st_size)
    tokens = np.memmap(bin, dtype=dtype, mode="r") if bin.stat().st_size else np.zeros(0, dtype)
    starts_S = offsets_S // dtype.itemsize
    for number, (first, stop) in enumerate(zip(bounds_D[:-1].tolist(), bounds_D[1:].tolist(), strict=True), start=1):
        parts = [tokens[starts_S[s] : starts_S[s] + lengths_S[s]] for s in range(first, stop)]
        yield TokenDocument(f"{name}#{number}", np.concatenate([tokens[:0], *parts]))


def _load_index(
    idx: Path, bin_bytes: int
) -> tuple[np.dtype[Any], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    size = idx.stat().st_size
    with idx.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or header[:9] != MAGIC:
        raise InputError(f"{idx}: not an index of a Megatron data set")
    _, version, code, sequences, bounds = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise InputError(f"{idx}: version {version} with token type {code}; only integer tokens of version 1 are read")
    expected = HEADER.size + sequences * 12 + bounds * 8
    # Data sets with several modalities append one byte per sequence.
    if size not in (expected, expected + sequences):
        raise InputError(f"{idx}: {size} bytes, but its header asks for {expected}; restore the file")
    content = np.memmap(idx, mode="r")[HEADER.size :]
    lengths_S = content[: 4 * sequences].view("<i4").astype(np.int64)
    offsets_S = content[4 * sequences : 12 * sequences].view("<i8").astype(np.int64)
    bounds_D = content[12 * sequences : 12 * sequences + 8 * bounds].view("<i8").astype(np.int64)
    dtype = np.dtype(DTYPES[code])
    ends_S = np.cumsum(lengths_S) * dtype.itemsize
    # Megatron's builder writes one sequence after the other, and nothing else.
    if sequences and (lengths_S.min() < 0 or (offsets_S != ends_S - lengths_S * dtype.itemsize).any()):
        raise InputError(f"{idx}: a sequence lies outside of its place in {idx.with_suffix('.bin')}; restore both")
    covered = int(ends_S[-1]) if sequences else 0
    if covered != bin_bytes:
        raise InputError(
            f"{idx}: its sequences take {covered} bytes, {idx.with_suffix('.bin')} has {bin_bytes}; restore both"
        )
    if not len(bounds_D) or bounds_D[0] != 0 or bounds_D[-1] != sequences or (np.diff(bounds_D) < 0).any():
        raise InputError(f"{idx}: its document bounds do not run from 0 to {sequences}; restore the file")
    return dtype, lengths_S, offsets_S, bounds_D

"""A stream that shows every row several times in a row, for objectives that mask one text in several ways."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_md.batch import DamagedDocument, Int64Array, Rows
from megatron_md.data.stream import RowStream


class RepeatedRows:
    """Every row of a stream several times in a row: row g shows row g // times of it.

    Attributes:
        is_ragged: as the stream's.
        stream: what is repeated.
        times: how often.
    """

    def __init__(self, stream: RowStream, times: int) -> None:
        self.is_ragged, self.stream, self.times = stream.is_ragged, stream, times

    def rows(self, sample_index: Sequence[int] | Int64Array) -> Rows:
        """See `RowStream.rows`."""
        index_B = np.asarray(sample_index, dtype=np.int64)
        return replace(self.stream.rows(index_B // self.times), sample_index_B=index_B)

    def row_lengths(self, sample_index: Sequence[int] | Int64Array) -> Int64Array:
        """See `RowStream.row_lengths`."""
        return self.stream.row_lengths(np.asarray(sample_index, dtype=np.int64) // self.times)

    def state(self, rows: int) -> dict[str, Any]:
        """See `RowStream.state`."""
        return self.stream.state(-(-rows // self.times))

    def quarantine(self, documents: Iterable[DamagedDocument]) -> None:
        """See `RowStream.quarantine`."""
        self.stream.quarantine(documents)

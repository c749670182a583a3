"""The row order: which tokens of the corpus make up row g of a run. Arithmetic only, no file is read here.

Every epoch permutes the shards, groups them into windows of W, permutes the documents of a window, concatenates them
with `<eos>` after each, cuts rows of L tokens (the window's last row is padded) and permutes those rows. The number
of rows of a window follows from its shards' totals in the manifest, so any g is found without reading what came
before. All is a pure function of (manifest hash, seed, L, W, g), and epochs go on for ever.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


def permutation(count: int, *key: str | int) -> Int64Array:
    """A permutation of range(count) that depends on the key only.

    Sorts raw words of the counter-based Philox generator: unlike `Generator.permutation`, numpy promises their
    stream for all its versions.
    """
    digest = hashlib.sha256("\n".join(map(str, key)).encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return np.argsort(words, kind="stable")


@dataclass(frozen=True)
class RowPlace:
    """Where row g lies: row `row` (in reading order) of window `window` of epoch `epoch`."""

    epoch: int
    window: int
    row: int


class RowOrder:
    """Finds the window that holds row g, and the shards of that window."""

    def __init__(
        self, shard_tokens: Int64Array, *, seq_length: int, window_shards: int, seed: int, corpus: str
    ) -> None:
        """Take the totals of the corpus.

        Args:
            shard_tokens: tokens [shards] of each shard, one `<eos>` per document included; all positive.
            seq_length: tokens per row (L).
            window_shards: shards per window (W); the last window of an epoch may hold fewer.
            seed: seed of the order.
            corpus: hash of the corpus.
        """
        self._shard_tokens = np.asarray(shard_tokens, dtype=np.int64)
        self._seq_length, self._window_shards = seq_length, window_shards
        self.key = (corpus, seed)
        # First row of each epoch: windows group other shards each time, so the counts of padded rows differ.
        self._epoch_starts = [0]
        self._epoch = lru_cache(maxsize=4)(self._lay_out_epoch)

    def locate(self, row: int) -> RowPlace:
        """Place of row g = `row`."""
        if len(self._shard_tokens) <= self._window_shards:
            epoch, local = divmod(row, self.rows_of_epoch(0))
            return RowPlace(epoch, 0, local)
        while self._epoch_starts[-1] <= row:
            self._epoch_starts.append(self._epoch_starts[-1] + self.rows_of_epoch(len(self._epoch_starts) - 1))
        epoch = bisect_right(self._epoch_starts, row) - 1
        window_starts = self._epoch(epoch)[1]
        local = row - self._epoch_starts[epoch]
        window = int(np.searchsorted(window_starts, local, side="right")) - 1
        return RowPlace(epoch, window, local - int(window_starts[window]))

    def rows_of_epoch(self, epoch: int) -> int:
        """Number of rows of an epoch."""
        return int(self._epoch(epoch)[1][-1])

    def shards_of_window(self, epoch: int, window: int) -> Int64Array:
        """Numbers of the shards that make up a window."""
        first = window * self._window_shards
        return self._epoch(epoch)[0][first : first + self._window_shards]

    def _lay_out_epoch(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """Order of the shards, and the first row of each window followed by the number of rows."""
        shards = permutation(len(self._shard_tokens), "shards", *self.key, epoch)
        tokens = np.add.reduceat(self._shard_tokens[shards], np.arange(0, len(shards), self._window_shards))
        rows = -(-tokens // self._seq_length)
        return shards, np.concatenate([[0], np.cumsum(rows)])


class Piece(NamedTuple):
    """A part of one document within a row.

    Attributes:
        document: number of the document in the window, in file order.
        start, stop: range of its tokens; `stop` is its length + 1 where its `<eos>` is part of the piece.
    """

    document: int
    start: int
    stop: int


class WindowLayout:
    """The rows of one window.

    Attributes:
        rows: number of rows.
    """

    def __init__(self, document_tokens: Int64Array, seq_length: int, *key: str | int) -> None:
        """Permute documents and rows.

        Args:
            document_tokens: tokens [documents] of the window's documents in file order, without `<eos>`.
            seq_length: tokens per row (L).
            key: what the two permutations depend on.
        """
        self._seq_length = seq_length
        self._documents = permutation(len(document_tokens), "documents", *key)
        self._ends = np.cumsum(document_tokens[self._documents] + 1)
        self.rows = -(-int(self._ends[-1]) // seq_length)
        self._rows = permutation(self.rows, "rows", *key)

    def pieces(self, row: int) -> list[Piece]:
        """What row `row` (in reading order) is made of, from left to right; less than L tokens in one row only."""
        begin = int(self._rows[row]) * self._seq_length
        end = min(begin + self._seq_length, int(self._ends[-1]))
        first = int(np.searchsorted(self._ends, begin, side="right"))
        last = int(np.searchsorted(self._ends, end, side="left"))
        start_of_first = int(self._ends[first - 1]) if first else 0
        document_ends = self._ends[first : last + 1].tolist()
        pieces = []
        for document, start, stop in zip(
            self._documents[first : last + 1].tolist(), [start_of_first, *document_ends], document_ends, strict=False
        ):
            pieces.append(Piece(document, max(begin, start) - start, min(end, stop) - start))
        return pieces

"""The row order: which tokens of the corpus make up row g of a run. Arithmetic only, no file is read here.

Every epoch permutes the shards, groups them into windows of W, permutes the documents of a window, concatenates all
windows with `<eos>` after each document, cuts rows of L tokens (the epoch's last row is padded) and permutes the rows
that begin in the same window. So every epoch has ceil(tokens / L) rows, however its windows fall out, and any g is
found by division and the shards' totals in the manifest: nothing before it is looked at. All is a pure function of
(manifest hash, seed, L, W, g), and epochs go on for ever.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from operator import sub
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


class Span(NamedTuple):
    """Tokens `start` to `stop` (not included) of the concatenated documents of window `window`."""

    window: int
    start: int
    stop: int


@dataclass(frozen=True)
class RowPlace:
    """What row g is cut from: spans of epoch `epoch`, one unless the row runs on into the next window."""

    epoch: int
    spans: tuple[Span, ...]


class RowOrder:
    """Finds what row g is cut from, and the shards of a window.

    Attributes:
        rows_per_epoch: rows of every epoch, ceil(tokens / L).
        key: what all permutations depend on besides the epoch.
    """

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
        self.rows_per_epoch = -(-int(self._shard_tokens.sum()) // seq_length)
        self.key = (corpus, seed)
        self._epoch = lru_cache(maxsize=4)(self._lay_out_epoch)
        self._rows = lru_cache(maxsize=4)(self._permute_rows)

    def locate(self, row: int) -> RowPlace:
        """Place of row g = `row`."""
        epoch, local = divmod(row, self.rows_per_epoch)
        # As memoryviews, which give plain numbers.
        starts, first_rows = (values.data for values in self._epoch(epoch)[1:])
        window = bisect_right(first_rows, local) - 1
        first = first_rows[window]
        begin = (first + self._rows(epoch, window).data[local - first]) * self._seq_length
        end = min(begin + self._seq_length, starts[-1])
        spans = []
        while begin < end:
            start, stop = starts[window], min(end, starts[window + 1])
            spans.append(Span(window, begin - start, stop - start))
            begin, window = stop, window + 1
        return RowPlace(epoch, tuple(spans))

    def shards_of_window(self, epoch: int, window: int) -> Int64Array:
        """Numbers of the shards that make up a window; none beyond the epoch's last window."""
        first = window * self._window_shards
        return self._epoch(epoch)[0][first : first + self._window_shards]

    def _lay_out_epoch(self, epoch: int) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Order of the shards; the first token and the first row of each window, followed by the totals."""
        shards = permutation(len(self._shard_tokens), "shards", *self.key, epoch)
        tokens = np.add.reduceat(self._shard_tokens[shards], np.arange(0, len(shards), self._window_shards))
        starts = np.concatenate([[0], np.cumsum(tokens)])
        return shards, starts, -(-starts // self._seq_length)

    def _permute_rows(self, epoch: int, window: int) -> Int64Array:
        """In which order the rows are read that begin in a window."""
        first_rows = self._epoch(epoch)[2]
        return permutation(int(first_rows[window + 1] - first_rows[window]), "rows", *self.key, epoch, window)


# A part of one document within a row: the document's number in the window, in file order, and the range of its tokens;
# the end of the range is its length + 1 where its `<eos>` is part of the piece. A plain tuple, as there are so many.
Piece = tuple[int, int, int]


class WindowLayout:
    """The permuted and concatenated documents of one window."""

    def __init__(self, document_tokens: Int64Array, taken: Int64Array, *key: str | int) -> None:
        """Permute the documents.

        Args:
            document_tokens: tokens [documents] of the window's documents in file order, without `<eos>`.
            taken: numbers of those that are served.
            key: what the permutation depends on.
        """
        self._documents = taken[permutation(len(taken), "documents", *key)]
        self._ends = np.cumsum(document_tokens[self._documents] + 1)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """What the window's tokens `start` to `stop` (not included) are made of, from left to right."""
        first, last = bisect_right(self._ends.data, start), bisect_left(self._ends.data, stop)
        documents, ends = self._documents[first : last + 1].tolist(), self._ends[first : last + 1].tolist()
        begins = [int(self._ends[first - 1]) if first else 0, *ends[:-1]]
        starts, stops = [0] * len(ends), list(map(sub, ends, begins))
        starts[0], stops[-1] = start - begins[0], stop - begins[-1]
        return list(zip(documents, starts, stops, strict=True))

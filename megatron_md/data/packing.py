"""The row order: which tokens of the corpus make up row g of a run. Arithmetic only, no file is read here.

Every epoch permutes the shards, groups them into windows of W, permutes the documents of a window, concatenates all
windows with `<eos>` after each document, cuts rows of L tokens (the epoch's last row is padded) and permutes the rows
that begin in the same window. So every epoch has ceil(tokens / L) rows, however its windows fall out, and any g is
found by division and the shards' totals in the manifest: nothing before it is looked at. All is a pure function of
(manifest hash, seed, L, W, g), and epochs go on for ever.
"""

from __future__ import annotations

import hashlib
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
        _, starts, first_rows = self._epoch(epoch)
        window = int(np.searchsorted(first_rows, local, side="right")) - 1
        first = int(first_rows[window])
        begin = (first + int(self._rows(epoch, window)[local - first])) * self._seq_length
        end = min(begin + self._seq_length, int(starts[-1]))
        spans = []
        while begin < end:
            start, stop = int(starts[window]), min(end, int(starts[window + 1]))
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
    """The permuted and concatenated documents of one window."""

    def __init__(self, document_tokens: Int64Array, *key: str | int) -> None:
        """Permute the documents.

        Args:
            document_tokens: tokens [documents] of the window's documents in file order, without `<eos>`.
            key: what the permutation depends on.
        """
        self._documents = permutation(len(document_tokens), "documents", *key)
        self._ends = np.cumsum(document_tokens[self._documents] + 1)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """What the window's tokens `start` to `stop` (not included) are made of, from left to right."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        documents, ends = self._documents[first : last + 1].tolist(), self._ends[first : last + 1].tolist()
        begins = [int(self._ends[first - 1]) if first else 0, *ends[:-1]]
        pieces = [Piece(document, 0, end - begin) for document, begin, end in zip(documents, begins, ends, strict=True)]
        pieces[0] = Piece(documents[0], start - begins[0], pieces[0].stop)
        pieces[-1] = Piece(documents[-1], pieces[-1].start, stop - begins[-1])
        return pieces

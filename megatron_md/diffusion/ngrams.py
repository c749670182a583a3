"""How often n-grams recur in a corpus, in one pass and bounded memory: the weights behind a predicted mask rate.

Counting every n-gram takes memory that grows with the corpus. What is needed is less: how many n-grams of each order
occur at least `min_count` times, as types, and how many occurrences they have. So each order keeps the exact counts of
those n-grams whose 64-bit hash lies below a limit (distinct sampling: Gibbons & Tirthapura, SPAA 2001). The limit
starts at the top, where nothing is left out, and is halved whenever more than `capacity` different n-grams are held;
what falls out never comes back, so the counts of the rest stay exact. Up to `capacity` the result is exact, but for two
n-grams with the same hash (of D different ones about D^2 / 2^65 pairs); beyond it carries a standard error, which is
reported. The result does not depend on the order of the documents. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_md.errors import UserError

ORDERS = (2, 3, 4, 5, 6)
MIN_COUNT = 5
CAPACITY = 1 << 22
By = Literal["types", "occurrences"]

Tokens = npt.NDArray[np.integer[Any]]
HashArray = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

_CHUNK_TOKENS = 1 << 18
_PENDING = 1 << 20
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class OrderCounts:
    """The recurring n-grams of one order.

    Attributes:
        positions: occurrences of all n-grams.
        kept: share of the different n-grams that were counted; 1: all of them.
        types: different n-grams that occur often enough (an estimate where `kept` is below 1).
        types_stderr: its standard error.
        occurrences: occurrences of these.
        occurrences_stderr: its standard error.
    """

    positions: int
    kept: float
    types: float
    types_stderr: float
    occurrences: float
    occurrences_stderr: float

    def estimate(self, by: By) -> tuple[float, float]:
        """The estimate and its standard error."""
        if by == "types":
            return self.types, self.types_stderr
        return self.occurrences, self.occurrences_stderr


class NgramCounter:
    """Counts n-grams of several orders, document by document; no n-gram crosses from one into the next.

    Memory: 12 bytes for each of `capacity` n-grams and order, and about as much again while one order is updated.

    Attributes:
        orders: the lengths of n-grams, ascending.
        min_count: occurrences from which an n-gram counts as recurring.
        tokens: tokens seen.
    """

    def __init__(self, orders: Iterable[int] = ORDERS, min_count: int = MIN_COUNT, *, capacity: int = CAPACITY) -> None:
        """Start with nothing counted.

        Raises:
            UserError: no order or one below 1, or `min_count` or `capacity` below 1.
        """
        self.orders = tuple(sorted(set(orders)))
        if not self.orders or self.orders[0] < 1:
            raise UserError(f"n-grams have orders from 1 up, got {list(self.orders)}")
        for name, value in (("min_count", min_count), ("capacity", capacity)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.min_count = min_count
        self.tokens = 0
        self._samples = {order: _DistinctSample(capacity, min_count) for order in self.orders}

    def add(self, documents: Iterable[Tokens]) -> None:
        """Count the n-grams of these documents, given as token ids [n] each.

        Raises:
            UserError: a document is not a one-dimensional array of integers.
        """
        for tokens, starts in _chunks(documents, overlap=self.orders[-1] - 1):
            self.tokens += int(np.count_nonzero(starts))
            for order, hashes in _hashes(tokens, starts, self.orders):
                self._samples[order].add(hashes)

    def counts(self) -> dict[int, OrderCounts]:
        """What was found so far, by order; more documents may follow."""
        return {order: sample.counts() for order, sample in self._samples.items()}


def weights_of(counts: Mapping[int, OrderCounts], by: By = "types") -> dict[int, float]:
    """The share of each order among the n-grams that recur (arXiv 2601.22450, F.4); they sum to 1.

    Args:
        counts: of each order.
        by: count different n-grams (`types`) or their occurrences; the paper does not say which it means.

    Raises:
        UserError: no n-gram recurs.
    """
    found = {order: count.estimate(by)[0] for order, count in counts.items()}
    total = sum(found.values())
    if total <= 0.0:
        raise UserError("no n-gram recurs often enough: take more text, or a smaller min_count")
    return {order: value / total for order, value in found.items()}


def weights_stderr(counts: Mapping[int, OrderCounts], by: By = "types") -> dict[int, float]:
    """Standard errors of `weights_of`, to first order; the orders are sampled independently. 0 where it is exact.

    Raises:
        UserError: no n-gram recurs.
    """
    weights = weights_of(counts, by)
    total = sum(count.estimate(by)[0] for count in counts.values())
    variance = {order: (count.estimate(by)[1] / total) ** 2 for order, count in counts.items()}
    everything = sum(variance.values())
    return {
        order: float(np.sqrt((1.0 - 2.0 * w) * variance[order] + w * w * everything)) for order, w in weights.items()
    }


class _DistinctSample:
    """Exact counts, up to `min_count`, of the keys below a limit that falls as more different keys come."""

    def __init__(self, capacity: int, min_count: int) -> None:
        self._capacity, self._min_count = capacity, min_count
        self._keys: HashArray = np.empty(0, dtype=np.uint64)
        self._counts = np.empty(0, dtype=np.int32)
        self._pending: list[HashArray] = []
        self._halvings = 0
        self._seen = 0

    @property
    def _limit(self) -> np.uint64:
        return np.uint64((1 << (64 - self._halvings)) - 1)

    def add(self, keys: HashArray) -> None:
        self._seen += len(keys)
        self._pending.append(keys[keys <= self._limit] if self._halvings else keys)
        if sum(map(len, self._pending)) >= _PENDING:
            self._merge()

    def _merge(self) -> None:
        """Count what is pending, and lower the limit until the keys fit."""
        keys, counts = np.unique(np.concatenate([self._keys[:0], *self._pending]), return_counts=True)
        self._pending = []
        # No count above min_count is ever asked for, so they stay there and cannot overflow.
        counts = np.minimum(counts, self._min_count).astype(np.int32)
        at = np.searchsorted(self._keys, keys)
        is_known = np.zeros(len(keys), dtype=np.bool_)
        inside = at < len(self._keys)
        is_known[inside] = self._keys[at[inside]] == keys[inside]
        known = at[is_known]
        self._counts[known] = np.minimum(self._counts[known].astype(np.int64) + counts[is_known], self._min_count)
        self._keys = np.insert(self._keys, at[~is_known], keys[~is_known])
        self._counts = np.insert(self._counts, at[~is_known], counts[~is_known])
        while len(self._keys) > self._capacity:
            self._halvings += 1
            stay = int(np.searchsorted(self._keys, self._limit, side="right"))
            self._keys, self._counts = self._keys[:stay].copy(), self._counts[:stay].copy()

    def counts(self) -> OrderCounts:
        """Estimates from a share `kept` = 2^-halvings of the different keys.

        Types: those found, divided by `kept`. Occurrences: all positions less those of the rare n-grams, divided by
        `kept`; rare ones have small counts, so that a few frequent ones cannot spoil the estimate.
        """
        self._merge()
        kept = 0.5**self._halvings
        is_rare = self._counts < self._min_count
        rare = self._counts[is_rare].astype(np.float64)
        types = len(self._counts) - len(rare)
        # Each key is kept independently with probability `kept`: variance (1 - kept) / kept^2 per squared value.
        scale = np.sqrt(1.0 - kept) / kept
        return OrderCounts(
            positions=self._seen,
            kept=kept,
            types=types / kept,
            types_stderr=float(scale * np.sqrt(types)),
            occurrences=max(0.0, self._seen - float(rare.sum()) / kept),
            occurrences_stderr=float(scale * np.sqrt(np.sum(rare**2))),
        )


def _chunks(documents: Iterable[Tokens], overlap: int) -> Iterator[tuple[HashArray, Int64Array]]:
    """Tokens of about _CHUNK_TOKENS at a time, and for each how many tokens an n-gram that starts there may have.

    A longer document comes in pieces. A piece ends with the `overlap` first tokens of the next one, where 0 n-grams
    start, so that each n-gram is met once.
    """
    pieces: list[Tokens] = []
    rooms: list[Int64Array] = []
    size = 0
    for document in documents:
        document = np.asarray(document)
        if document.ndim != 1 or (document.size and document.dtype.kind not in "iu"):
            raise UserError(f"a document is a list of token ids, got {document.dtype} of shape {document.shape}")
        for first in range(0, len(document), _CHUNK_TOKENS):
            piece = document[first : first + _CHUNK_TOKENS + overlap]
            room = np.arange(len(piece), 0, -1)
            room[_CHUNK_TOKENS:] = 0
            pieces.append(piece)
            rooms.append(room)
            size += len(piece)
            if size >= _CHUNK_TOKENS:
                yield _joined(pieces), np.concatenate(rooms)
                pieces, rooms, size = [], [], 0
    if pieces:
        yield _joined(pieces), np.concatenate(rooms)


def _joined(pieces: Sequence[Tokens]) -> HashArray:
    return np.concatenate([piece.astype(np.uint64) for piece in pieces])


def _hashes(tokens: HashArray, room: Int64Array, orders: Sequence[int]) -> Iterator[tuple[int, HashArray]]:
    """For each order the hashes of all n-grams: h(t_1..t_i) = mix(h(t_1..t_{i-1}) + t_i), 64 bits."""
    hashes = _mix(tokens)
    for order in range(1, orders[-1] + 1):
        if order > 1:
            hashes = _mix(hashes[:-1] + tokens[order - 1 :])
        if order in orders:
            yield order, hashes[room[: len(hashes)] >= order]
        if len(hashes) < 2:
            return


def _mix(values: HashArray) -> HashArray:
    """SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): one to one, and every input bit moves every output bit."""
    z = values + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))

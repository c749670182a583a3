"""Mixture of corpora: a fixed schedule that says from which corpus row g of a run comes, and which row of it that is.

Weights become whole numbers u_k of rows per period D = sum_k u_k. Within a period, row j of corpus k gets the slot that
the earliest-deadline-first rule gives it among the slots floor(j D / u_k) .. ceil((j + 1) D / u_k) - 1. One machine and
unit jobs of total load 1: that rule always meets the deadlines (Baruah et al. 1996, "Proportionate progress"), so after
any n rows each corpus has served floor(n u_k / D) or ceil(n u_k / D): within one row of its share, everywhere. Any g
is found by division; nothing before it is looked at.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_md.batch import DamagedDocument, Int32Array, Int64Array
from megatron_md.config import DataConfig
from megatron_md.data.shards import Manifest
from megatron_md.data.stream import Rows, RowStream, SequenceStream

# Shares are exact where they have a common denominator up to this (five decimal places), else rounded to multiples of
# 1 / this.
LONGEST_PERIOD = 100_000

Points = Sequence[tuple[int, float]]


@lru_cache(maxsize=16)
def interleave(units: tuple[int, ...]) -> Int64Array:
    """The corpus [sum of units] of every slot of a period, each corpus k in units[k] of them; see above."""
    period = sum(units)
    waiting = [(0, corpus, 0) for corpus, unit in enumerate(units) if unit]
    ready: list[tuple[int, int]] = []
    slots = np.empty(period, dtype=np.int64)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, corpus, row = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(row + 1) * period // units[corpus]), corpus))
            if row + 1 < units[corpus]:
                heapq.heappush(waiting, ((row + 1) * period // units[corpus], corpus, row + 1))
        deadline, slots[slot] = heapq.heappop(ready)
        assert slot < deadline
    return slots


def whole_units(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each corpus per period for weights of any scale; exact up to `LONGEST_PERIOD`, see there.

    Raises:
        ValueError: all weights are 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    if not total:
        raise ValueError("all weights are 0: give at least one corpus a weight above 0")
    shares = [weight / total for weight in exact]
    if math.lcm(*(share.denominator for share in shares)) > LONGEST_PERIOD:
        rounded = [max(1, round(share * LONGEST_PERIOD)) if share else 0 for share in shares]
        shares = [Fraction(unit, sum(rounded)) for unit in rounded]
    period = math.lcm(*(share.denominator for share in shares))
    return tuple(int(share * period) for share in shares)


@dataclass(frozen=True)
class _Stretch:
    """Rows with the same weights, from `start` on; `served_K` rows of each corpus came before."""

    start: int
    served_K: Int64Array
    units_K: Int64Array
    slots_D: Int64Array
    earlier_D: Int64Array  # rows of the slot's own corpus in earlier slots of the period


class MixtureSchedule:
    """Which corpus, and which of its rows, every row of a run is."""

    def __init__(self, points: Sequence[Points]) -> None:
        """Lay the schedule out.

        Args:
            points: for each corpus, from which g on it has which weight: [(g, weight), ...] with g ascending. Before
                its first point a corpus has weight 0. New weights hold from the end of the period that is running
                at g (at most `LONGEST_PERIOD` rows later), where every corpus has had its share exactly.

        Raises:
            ValueError: the g of a corpus do not ascend, or at some g all weights are 0.
        """
        for own in points:
            if [g for g, _ in own] != sorted({g for g, _ in own}):
                raise ValueError(f"the rows {[g for g, _ in own]} at which a weight changes must ascend")
        self._stretches: list[_Stretch] = []
        for change in sorted({0, *(g for own in points for g, _ in own)}):
            weights = [next((weight for g, weight in reversed(own) if g <= change), 0.0) for own in points]
            try:
                self._append(change, whole_units(weights))
            except ValueError as error:
                raise ValueError(f"at row {change} {error}") from None
        self._starts = np.array([stretch.start for stretch in self._stretches], dtype=np.int64)

    def _append(self, change: int, units: tuple[int, ...]) -> None:
        start, served_K = 0, np.zeros(len(units), dtype=np.int64)
        if self._stretches:
            last = self._stretches[-1]
            periods = max(0, -(-(change - last.start) // len(last.slots_D)))
            start = last.start + periods * len(last.slots_D)
            served_K = last.served_K + periods * last.units_K
        slots_D = interleave(units)
        earlier_D = np.empty_like(slots_D)
        for corpus, unit in enumerate(units):
            earlier_D[slots_D == corpus] = np.arange(unit)
        self._stretches.append(_Stretch(start, served_K, np.array(units, dtype=np.int64), slots_D, earlier_D))

    def locate(self, sample_index: Sequence[int] | Int64Array) -> tuple[Int64Array, Int64Array]:
        """Corpus and row of that corpus for each g: int64 [B], int64 [B]."""
        index_B = np.asarray(sample_index, dtype=np.int64)
        corpus_B, row_B = np.empty_like(index_B), np.empty_like(index_B)
        stretch_B = np.searchsorted(self._starts, index_B, side="right") - 1
        for number in np.unique(stretch_B).tolist():
            stretch, is_here_B = self._stretches[number], stretch_B == number
            period, slot = np.divmod(index_B[is_here_B] - stretch.start, len(stretch.slots_D))
            corpus = stretch.slots_D[slot]
            corpus_B[is_here_B] = corpus
            row_B[is_here_B] = stretch.served_K[corpus] + period * stretch.units_K[corpus] + stretch.earlier_D[slot]
        return corpus_B, row_B


class MixtureStream:
    """Rows of several corpora by a `MixtureSchedule`; each corpus goes through epochs of its own.

    As stateless as `SequenceStream`, and not to be used from two threads at once either.
    """

    def __init__(self, streams: Sequence[SequenceStream], points: Sequence[Points]) -> None:
        """Mix streams of equal row length.

        Raises:
            ValueError: see `MixtureSchedule`.
        """
        assert len(streams) == len(points) and len({stream.seq_length for stream in streams}) == 1
        self.streams = list(streams)
        self.schedule = MixtureSchedule(points)
        self._points = [[[g, weight] for g, weight in own] for own in points]

    def rows(self, sample_index: Sequence[int] | Int64Array) -> Rows:
        """The rows of these g, in this order.

        Raises:
            ShardError: see `SequenceStream.rows`.
        """
        index_B = np.asarray(sample_index, dtype=np.int64)
        corpus_B, row_B = self.schedule.locate(index_B)
        tokens_BL = np.empty((len(index_B), self.streams[0].seq_length), dtype=np.int64)
        is_maskable_BL = np.empty(tokens_BL.shape, dtype=np.bool_)
        boundaries: dict[int, Int32Array] = {}
        damaged: frozenset[DamagedDocument] = frozenset()
        for corpus in np.unique(corpus_B).tolist():
            places = np.flatnonzero(corpus_B == corpus)
            part = self.streams[corpus].rows(row_B[places])
            tokens_BL[places], is_maskable_BL[places] = part.tokens_BL, part.is_maskable_BL
            boundaries |= dict(zip(places.tolist(), part.cu_seqlens, strict=True))
            damaged |= part.damaged
        cu_seqlens = [boundaries[b] for b in range(len(index_B))]
        return Rows(tokens_BL, is_maskable_BL, index_B, cu_seqlens, corpus_B, damaged)

    def state(self) -> dict[str, Any]:
        """See `SequenceStream.state`."""
        corpora = [
            {"corpus": stream.manifest.sha256, "weight": own}
            for stream, own in zip(self.streams, self._points, strict=True)
        ]
        return {**self.streams[0].state(), "corpus": corpora}

    def quarantine(self, documents: Iterable[DamagedDocument]) -> None:
        """See `SequenceStream.quarantine`."""
        documents = list(documents)
        for stream in self.streams:
            stream.quarantine(documents)


def open_stream(config: DataConfig, manifests: Sequence[Manifest], *, seed: int) -> RowStream:
    """The rows that `data.train` asks for; damaged documents become gaps.

    Args:
        config: the `data` section.
        manifests: the loaded manifest of each of `config.corpora()`.
        seed: the run's seed.

    Raises:
        ValueError: see `MixtureSchedule`.
    """
    streams = [
        SequenceStream(
            manifest,
            seed=seed,
            seq_length=config.seq_length,
            window_shards=config.window_shards,
            keep_going=True,
        )
        for manifest in manifests
    ]
    if isinstance(config.train, str):
        return streams[0]
    return MixtureStream(streams, [corpus.points() for corpus in config.corpora()])

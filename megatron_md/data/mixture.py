"""Mixture of corpora: a fixed schedule that says from which corpus row g of a run comes, and which row of it that is.

Weights become whole numbers u_k of rows per period D = sum_k u_k; corpus k is due u_k / D rows per row of the run. Its
row j may be served from where it begins to be due, and has its deadline where it is wholly due if the weights stay as
they are. Of the rows that may be served, the one with the earliest deadline is. One machine and unit jobs of total
load 1: under constant weights that rule always meets the deadlines (Baruah et al. 1996, "Proportionate progress"), so
at every g each corpus has served what it is due rounded down or up: within one row of its share, everywhere.

At a change of weights every corpus keeps what it is due and has served, and the deadlines are set anew. No corpus ever
gets ahead by a row. Up to three corpora never fall behind by one either. Of more, one may (by less than 1.5 rows at
random changes), and no rule excludes that whose rows do not depend on later changes: let each row's weight go in
equal parts to the corpora that no row has come from yet. Of n corpora the last one is then behind by
1/2 + 1/3 + ... + 1/n after n - 1 rows, whichever rule has served the others: by 5/6 of three, by 13/12 of four.

From a change on, the schedule repeats itself after a few periods (one, where no corpus is behind: two schedules of the
same deadlines agree after D rows at the latest), so any g is found by division; nothing before it is looked at.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_md.batch import DamagedDocument, Int32Array, Int64Array, Rows
from megatron_md.config import CorpusConfig, DataConfig
from megatron_md.data.chat_rows import DialogueStream
from megatron_md.data.repeated import RepeatedRows
from megatron_md.data.shards import Manifest
from megatron_md.data.stream import RowStream, SequenceStream
from megatron_md.errors import UserError

# Shares are exact where they have a common denominator up to this (five decimal places), else rounded to multiples of
# 1 / this.
LONGEST_PERIOD = 100_000

Points = Sequence[tuple[int, float]]
CorpusStream = SequenceStream | DialogueStream


@lru_cache(maxsize=16)
def interleave(units: tuple[int, ...], due: tuple[Fraction, ...], count: int) -> Int64Array:
    """The corpus [count] of each of the next rows; see above.

    Args:
        units: rows of each corpus per period.
        due: rows that each corpus is due and has not been served; below 0 where it is ahead.
        count: rows to lay out.
    """
    period, corpora = sum(units), len(units)
    never = 2 * (count + period)
    begins: list[Int64Array] = []  # per corpus: the first slot that each of its rows may have
    jobs: list[Int64Array] = []  # and deadline * corpora + corpus, by which rows are served
    for corpus, (unit, one) in enumerate(zip(units, due, strict=True)):
        # With x = due * period and whole j, floor((j * period - x) / u) = floor((j * period - ceil(x)) / u), and so on.
        lower, upper = math.floor(one * period), math.ceil(one * period)
        rows = np.arange(max(0, -(-(count * unit + upper) // period)), dtype=np.int64)
        # A row that was begun before its corpus' weight became 0 comes when nothing else may.
        deadlines = (
            -(-((rows + 1) * period - lower) // unit) if unit else np.where((rows + 1) * period > lower, never, 0)
        )
        begins.append((rows * period - upper) // max(1, unit))
        jobs.append(deadlines * corpora + corpus)
    order_N = np.argsort(np.concatenate(begins), kind="stable")
    begin_N, job_N = np.concatenate(begins)[order_N].tolist(), np.concatenate(jobs)[order_N].tolist()
    ready: list[int] = []
    slots = np.empty(count, dtype=np.int64)
    first = 0
    for slot in range(count):
        while first < len(begin_N) and begin_N[first] <= slot:
            heapq.heappush(ready, job_N[first])
            first += 1
        assert ready, "what the corpora are due in all is a row per slot"
        slots[slot] = heapq.heappop(ready) % corpora
    return slots


def whole_units(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each corpus per period for weights of any scale; exact up to `LONGEST_PERIOD`, see there.

    Raises:
        UserError: all weights are 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    if not total:
        raise UserError("all weights are 0: give at least one corpus a weight above 0")
    shares = [weight / total for weight in exact]
    if math.lcm(*(share.denominator for share in shares)) > LONGEST_PERIOD:
        rounded = [max(1, round(share * LONGEST_PERIOD)) if share else 0 for share in shares]
        shares = [Fraction(unit, sum(rounded)) for unit in rounded]
    period = math.lcm(*(share.denominator for share in shares))
    return tuple(int(share * period) for share in shares)


@dataclass(frozen=True)
class _Stretch:
    """Rows with the same weights, from `start` on; `served_K` rows of each corpus came before.

    The last period of `slots_N` repeats itself.
    """

    start: int
    served_K: Int64Array
    units_K: Int64Array
    slots_N: Int64Array
    earlier_N: Int64Array  # rows of the slot's own corpus in earlier slots of the stretch

    @classmethod
    def lay_out(
        cls, start: int, stop: int | None, served_K: Int64Array, due: list[Fraction], units: tuple[int, ...]
    ) -> _Stretch:
        """Lay out the rows from `start` until `stop` or until they repeat themselves."""
        period, units_K = sum(units), np.array(units, dtype=np.int64)
        blocks: list[Int64Array] = []
        left = math.inf if stop is None else stop - start
        counts_K = np.zeros_like(units_K)
        while left > 0 and (counts_K != units_K).any():  # a period with every corpus' share ends as it began
            blocks.append(interleave(units, tuple(due), int(min(period, left))))
            left -= len(blocks[-1])
            counts_K = np.bincount(blocks[-1], minlength=len(units))
            due = [
                one + Fraction(unit * len(blocks[-1]), period) - count
                for one, unit, count in zip(due, units, counts_K.tolist(), strict=True)
            ]
        slots_N = np.concatenate(blocks)
        earlier_N = np.empty_like(slots_N)
        for corpus in range(len(units)):
            is_own_N = slots_N == corpus
            earlier_N[is_own_N] = np.arange(is_own_N.sum())
        return cls(start, served_K, units_K, slots_N, earlier_N)

    def locate(self, index_B: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Corpus and row of that corpus for each g of this stretch."""
        offset_B = index_B - self.start
        periods_B = np.maximum(0, (offset_B - len(self.slots_N)) // self.units_K.sum() + 1)
        slot_B = offset_B - periods_B * self.units_K.sum()
        corpus_B = self.slots_N[slot_B]
        earlier_B = periods_B * self.units_K[corpus_B] + self.earlier_N[slot_B]
        return corpus_B, self.served_K[corpus_B] + earlier_B

    def served(self, rows: int) -> Int64Array:
        """Rows of each corpus after the first `rows` rows of this stretch."""
        periods = max(0, -(-(rows - len(self.slots_N)) // int(self.units_K.sum())))
        slots_n = self.slots_N[: rows - periods * int(self.units_K.sum())]
        return self.served_K + periods * self.units_K + np.bincount(slots_n, minlength=len(self.units_K))


class MixtureSchedule:
    """Which corpus, and which of its rows, every row of a run is."""

    def __init__(self, points: Sequence[Points]) -> None:
        """Lay the schedule out.

        Args:
            points: for each corpus, from which g on it has which weight: [(g, weight), ...] with g ascending. Before
                its first point a corpus has weight 0. The rows before any g do not depend on the points from there on.

        Raises:
            UserError: the g of a corpus do not ascend, or at some g all weights are 0.
        """
        for own in points:
            if [g for g, _ in own] != sorted({g for g, _ in own}):
                raise UserError(f"the rows {[g for g, _ in own]} at which a weight changes must ascend")
        changes = sorted({0, *(g for own in points for g, _ in own)})
        self._stretches: list[_Stretch] = []
        served_K, due = np.zeros(len(points), dtype=np.int64), [Fraction(0)] * len(points)
        for start, stop in itertools.zip_longest(changes, changes[1:]):
            weights = [next((weight for g, weight in reversed(own) if g <= start), 0.0) for own in points]
            try:
                units = whole_units(weights)
            except ValueError as error:
                raise UserError(f"at row {start} {error}") from None
            stretch = _Stretch.lay_out(start, stop, served_K, due, units)
            self._stretches.append(stretch)
            if stop is not None:
                rows, before_K = stop - start, served_K
                served_K = stretch.served(rows)
                counts = (served_K - before_K).tolist()
                due = [
                    one + Fraction(unit * rows, sum(units)) - count
                    for one, unit, count in zip(due, units, counts, strict=True)
                ]
        self._starts = np.array(changes, dtype=np.int64)

    def served(self, rows: int) -> list[int]:
        """How many of the first `rows` rows are each corpus'."""
        stretch = self._stretches[int(np.searchsorted(self._starts, rows, side="right")) - 1]
        return stretch.served(rows - stretch.start).tolist()

    def locate(self, sample_index: Sequence[int] | Int64Array) -> tuple[Int64Array, Int64Array]:
        """Corpus and row of that corpus for each g: int64 [B], int64 [B]."""
        index_B = np.asarray(sample_index, dtype=np.int64)
        corpus_B, row_B = np.empty_like(index_B), np.empty_like(index_B)
        stretch_B = np.searchsorted(self._starts, index_B, side="right") - 1
        for number in np.unique(stretch_B).tolist():
            is_here_B = stretch_B == number
            corpus_B[is_here_B], row_B[is_here_B] = self._stretches[number].locate(index_B[is_here_B])
        return corpus_B, row_B


class MixtureStream:
    """Rows of several corpora by a `MixtureSchedule`; each corpus goes through epochs of its own.

    Text and dialogues may be mixed where dialogues are padded (in their row of text all is maskable). As stateless as
    `SequenceStream`, and not to be used from two threads at once either.
    """

    def __init__(self, streams: Sequence[CorpusStream], points: Sequence[Points]) -> None:
        """Mix streams of equal row length.

        Raises:
            UserError: see `MixtureSchedule`.
        """
        assert len(streams) == len(points) and len({stream.seq_length for stream in streams}) == 1
        self.streams = list(streams)
        self.is_ragged = any(stream.is_ragged for stream in streams)
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
        counts_documents, content_B = False, np.full(len(index_B), self.streams[0].seq_length)
        for corpus in np.unique(corpus_B).tolist():
            places = np.flatnonzero(corpus_B == corpus)
            part = self.streams[corpus].rows(row_B[places])
            tokens_BL[places], is_maskable_BL[places] = part.tokens_BL, part.is_maskable_BL
            boundaries |= dict(zip(places.tolist(), part.cu_seqlens or (), strict=True))
            damaged |= part.damaged
            counts_documents |= part.counts_documents
            if part.content_B is not None:
                content_B[places] = part.content_B
        cu_seqlens = [boundaries[b] for b in range(len(index_B))]
        return Rows(
            tokens_BL,
            is_maskable_BL,
            index_B,
            cu_seqlens=cu_seqlens,
            damaged=damaged,
            counts_documents=counts_documents,
            content_B=content_B if self.is_ragged else None,
        )

    def row_lengths(self, sample_index: Sequence[int] | Int64Array) -> Int64Array:
        """See `RowStream.row_lengths`."""
        corpus_B, row_B = self.schedule.locate(sample_index)
        length_B = np.empty_like(row_B)
        for corpus in np.unique(corpus_B).tolist():
            length_B[corpus_B == corpus] = self.streams[corpus].row_lengths(row_B[corpus_B == corpus])
        return length_B

    def state(self, rows: int) -> dict[str, Any]:
        """See `RowStream.state`: weights count as far as they hold before row `rows`."""
        corpora = []
        for stream, own in zip(self.streams, self._points, strict=True):
            part = {} if stream.max_tokens is None else {"max_tokens": stream.max_tokens}
            weight = [[g, weight] for g, weight in own if g < rows]
            corpora.append({"corpus": stream.manifest.sha256, "weight": weight, **part})
        of_streams = {key: value for stream in self.streams for key, value in stream.state(rows).items()}
        used = [corpus for corpus in corpora if corpus["weight"]]
        return {**of_streams, "corpus": used, "data.max_tokens": None}  # each corpus has its own

    def quarantine(self, documents: Iterable[DamagedDocument]) -> None:
        """See `SequenceStream.quarantine`."""
        documents = list(documents)
        for stream in self.streams:
            stream.quarantine(documents)


def corpus_stream(config: DataConfig, corpus: CorpusConfig, manifest: Manifest, *, seed: int) -> CorpusStream:
    """The rows of one corpus, text or chat; damaged documents become gaps.

    Raises:
        UserError: a dialogue is longer than a row, or `max_tokens` does not fit the corpus.
        ShardError: (of a chat corpus, all of whose indexes are read) a shard or its index is missing or damaged.
    """
    keys: dict[str, Any] = {"seed": seed, "seq_length": config.seq_length, "max_tokens": corpus.max_tokens}
    if manifest.kind == "chat":
        return DialogueStream(manifest, config.chat, keep_going=True, **keys)
    return SequenceStream(manifest, window_shards=config.window_shards, keep_going=True, **keys)


def open_stream(config: DataConfig, manifests: Sequence[Manifest], *, seed: int, rows_per_text: int = 1) -> RowStream:
    """The rows that `data.train` asks for; damaged documents become gaps.

    Args:
        config: the `data` section.
        manifests: the loaded manifest of each of `config.corpora()`.
        seed: the run's seed.
        rows_per_text: rows in a row that show the same text (`objective.pairs`).

    Raises:
        UserError: see `MixtureSchedule` and `corpus_stream`.
    """
    corpora = config.corpora()
    streams = [corpus_stream(config, *pair, seed=seed) for pair in zip(corpora, manifests, strict=True)]
    stream: RowStream = streams[0]
    if not isinstance(config.train, str):
        # Weights change at rows of the run, of which the mixture serves one in `rows_per_text`.
        points = [[(-(-g // rows_per_text), weight) for g, weight in corpus.points()] for corpus in corpora]
        stream = MixtureStream(streams, points)
    return stream if rows_per_text == 1 else RepeatedRows(stream, rows_per_text)

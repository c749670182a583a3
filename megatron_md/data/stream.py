"""The stream of rows that a run trains on: row g of a corpus, micro-batches of a global batch, reading ahead."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from megatron_md.batch import BatchPosition, CleanBatch, DamagedDocument, Int64Array, Rows
from megatron_md.data.cache import WindowFetcher
from megatron_md.data.packing import RowOrder, Span, WindowLayout
from megatron_md.data.remote import RemoteFile
from megatron_md.data.shards import DamagedDocumentError, Manifest, ShardReader
from megatron_md.data.subset import choose
from megatron_md.errors import UserError

T = TypeVar("T")

WINDOW_SHARDS = 8
VALIDATION_SEED = 0
_CHECKED, _UNCHECKED, _LEFT_OUT = range(3)  # states of a document

logger = logging.getLogger("megatron_md")


class RowStream(Protocol):
    """Where a run's rows come from: one corpus (`SequenceStream`, `DialogueStream`) or several (`MixtureStream`).

    Attributes:
        is_ragged: some rows hold fewer tokens than they have places for.
    """

    is_ragged: bool

    def rows(self, sample_index: Sequence[int] | Int64Array) -> Rows:
        """The rows of these g, in this order."""

    def row_lengths(self, sample_index: Sequence[int] | Int64Array) -> Int64Array:
        """How many tokens of each of these rows must be served: int64 [B]; what lies behind is padding."""

    def state(self, rows: int) -> dict[str, Any]:
        """What the first `rows` rows depend on, as JSON values; where it is equal, so are they."""

    def quarantine(self, documents: Iterable[DamagedDocument]) -> None:
        """Leave these documents out from here on without looking at them: a resumed run's known damage."""


class SequenceStream:
    """Rows of L tokens of a corpus, addressed by `sample_index` g = 0, 1, 2, …, without end.

    Stateless: any g is served at once, in any order, at a memory cost of a few windows' indexes. The order is that
    of `megatron_md.data.packing`. Not to be used from two threads at once.

    Attributes:
        manifest: the corpus.
        seq_length: tokens per row (L).
        subset: the documents of it that are served.
        max_tokens: what they were chosen by.
        rows_per_epoch: rows of every epoch, ceil(tokens / L).
        is_ragged: False, as rows are cut from whatever documents there are.
    """

    is_ragged = False

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        seq_length: int,
        window_shards: int = WINDOW_SHARDS,
        keep_going: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        """Open a corpus.

        Args:
            manifest: the corpus.
            seed: seed of the order.
            seq_length: tokens per row (L).
            window_shards: shards that are shuffled together (W).
            keep_going: a damaged document becomes a gap in its rows (padding, not maskable) instead of an error.
            max_tokens: serve documents with so many tokens in all, the same for every seed; None serves all.

        Raises:
            UserError: see `megatron_md.data.subset.choose`.
        """
        self.manifest, self.seq_length = manifest, seq_length
        self.max_tokens, self.subset = max_tokens, choose(manifest, max_tokens)
        self._seed, self._window_shards, self._keep_going = seed, window_shards, keep_going
        self._quarantined: dict[str, list[int]] = {}
        shard_tokens = self.subset.shard_tokens + self.subset.shard_documents
        self._order = RowOrder(
            shard_tokens, seq_length=seq_length, window_shards=window_shards, seed=seed, corpus=self.manifest.sha256
        )
        self.rows_per_epoch = self._order.rows_per_epoch
        remote = self.manifest.remote
        self._fetcher = WindowFetcher(self._remote_files, remote.cache) if remote is not None else None
        self._window = lru_cache(maxsize=2)(self._open_window)

    def rows(self, sample_index: Sequence[int] | Int64Array) -> Rows:
        """The rows of these g, in this order.

        Raises:
            ShardError: a document that they need is damaged (without `keep_going`), or a whole shard; names it.
        """
        count = len(sample_index)
        tokens_BL = np.empty((count, self.seq_length), dtype=np.int64)
        is_maskable_BL = np.zeros((count, self.seq_length), dtype=np.bool_)
        cu_seqlens = []
        damaged: set[DamagedDocument] = set()
        for b, g in enumerate(sample_index):
            place = self._order.locate(int(g))
            boundaries = [0]
            for span in place.spans:
                window, begin = self._window(place.epoch, span.window), boundaries[-1]
                ends, gaps = window.fill(span, tokens_BL[b, begin:])
                boundaries += [begin + end for end in ends]
                is_maskable_BL[b, begin : boundaries[-1]] = True
                for gap_begin, gap_end, document in gaps:
                    gap = slice(begin + gap_begin, begin + gap_end)
                    tokens_BL[b, gap], is_maskable_BL[b, gap] = self.manifest.pad_id, False
                    damaged.add(window.describe(document))
            if boundaries[-1] < self.seq_length:
                tokens_BL[b, boundaries[-1] :] = self.manifest.pad_id
                boundaries.append(self.seq_length)
            cu_seqlens.append(np.array(boundaries, dtype=np.int32))
        index_B = np.asarray(sample_index, dtype=np.int64)
        return Rows(tokens_BL, is_maskable_BL, index_B, cu_seqlens=cu_seqlens, damaged=frozenset(damaged))

    def row_lengths(self, sample_index: Sequence[int] | Int64Array) -> Int64Array:
        """L for each row; see `RowStream.row_lengths`."""
        return np.full(len(sample_index), self.seq_length)

    def quarantine(self, documents: Iterable[DamagedDocument]) -> None:
        """Leave these documents out from here on without looking at them; those of other corpora do not matter."""
        for damaged in documents:
            if damaged.corpus == self.manifest.sha256:
                self._quarantined.setdefault(damaged.shard, []).append(damaged.document)
        self._window.cache_clear()

    def state(self, rows: int) -> dict[str, Any]:
        """What the first `rows` rows depend on (here all others too). There is nothing else to restore."""
        return {
            "corpus": self.manifest.sha256,
            "seed": self._seed,
            "seq_length": self.seq_length,
            "window_shards": self._window_shards,
            "data.max_tokens": self.max_tokens,
        }

    def _remote_files(self, place: int) -> Sequence[RemoteFile]:
        return self.manifest.remote_files(int(self.subset.shards[place]))

    def _open_window(self, epoch: int, window: int) -> _Window:
        shards = self.subset.shards[self._order.shards_of_window(epoch, window)].tolist()
        if self._fetcher is not None:
            self._fetcher.bring(self._order, epoch, window)
        readers = [ShardReader(self.manifest, shard) for shard in shards]
        document_tokens = np.concatenate([reader.index["tokens"] for reader in readers]).astype(np.int64)
        taken = self.subset.numbers(shards, [len(reader.index) for reader in readers])
        layout = WindowLayout(document_tokens, taken, *self._order.key, epoch, window)
        names = [self.manifest.shards[shard].name for shard in shards]
        opened = _Window(self.manifest, names, readers, layout, document_tokens, self._keep_going)
        for number, name in enumerate(names):
            opened.leave_out(number, self._quarantined.get(name, []))
        return opened


class _Window:
    """The documents of one window, read through its layout."""

    def __init__(
        self,
        manifest: Manifest,
        names: list[str],
        readers: list[ShardReader],
        layout: WindowLayout,
        document_tokens: Int64Array,
        keep_going: bool,
    ) -> None:
        self._manifest, self._names, self._readers, self._layout = manifest, names, readers, layout
        self._document_tokens = document_tokens
        self._first_documents = [0, *itertools.accumulate(len(reader.index) for reader in readers)]
        # A byte for each document: what a numpy array gives one by one takes several times as long.
        self._states = bytearray([_UNCHECKED]) * len(document_tokens)
        self._keep_going = keep_going
        self._dtype = manifest.token_dtype
        self._eos_slot = bytes(self._dtype.itemsize)

    def leave_out(self, shard: int, documents: list[int]) -> None:
        """Treat these documents of the window's shard number `shard` as damaged."""
        for document in documents:
            self._states[self._first_documents[shard] + document] = _LEFT_OUT

    def fill(self, span: Span, tokens_n: Int64Array) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Write a span of this window to the beginning of `tokens_n`.

        Returns:
            Where each of its documents ends, and (begin, end, document) of the gaps that damaged documents (with
            their `<eos>`) leave.
        """
        ends, gaps, parts = [], [], []
        end = 0
        for document, start, stop in self._layout.pieces(span.start, span.stop):
            begin, end = end, end + stop - start
            ends.append(end)
            part = self._read(document, start, stop)
            if part is None:
                gaps.append((begin, end, document))
                part = self._eos_slot * (end - begin - 1)
            parts.append(part)
        # All at once: numpy takes longer for a call than for the tokens of a document.
        stored = self._eos_slot.join(parts)
        has_last_eos = len(stored) < end * len(self._eos_slot)
        stored += self._eos_slot * has_last_eos
        tokens_n[:end] = np.frombuffer(stored, self._dtype)
        # Which the stored type need not hold.
        tokens_n[np.array(ends if has_last_eos else ends[:-1], dtype=np.int64) - 1] = self._manifest.eos_id
        return ends, gaps

    def describe(self, document: int) -> DamagedDocument:
        """What a ledger says about a document of this window."""
        shard = bisect_right(self._first_documents, document) - 1
        number, tokens = document - self._first_documents[shard], int(self._document_tokens[document])
        return DamagedDocument(self._manifest.sha256, self._names[shard], number, tokens)

    def _read(self, document: int, start: int, stop: int) -> bytes | None:
        """A piece as it is stored, without `<eos>`; None if its document is damaged and the run goes on without it."""
        state = self._states[document]
        if state == _LEFT_OUT:
            return None
        shard = bisect_right(self._first_documents, document) - 1
        try:
            part = self._readers[shard].read(
                document - self._first_documents[shard], start, stop, verify=state == _UNCHECKED
            )
        except DamagedDocumentError as error:
            if not self._keep_going:
                raise
            logger.warning("left out: %s", error)
            self._states[document] = _LEFT_OUT
            return None
        self._states[document] = _CHECKED
        return part


def validation_rows(manifest: Manifest, seq_length: int, count: int) -> Rows:
    """A fixed set of distinct rows: the first `count` of the corpus' first epoch, or all where it holds fewer."""
    stream = SequenceStream(manifest, seed=VALIDATION_SEED, seq_length=seq_length)
    return stream.rows(range(min(count, stream.rows_per_epoch)))


def micro_batches(
    stream: RowStream,
    position: BatchPosition,
    micro_batch_size: int,
    *,
    data_rank: int,
    data_size: int,
    length: int | None = None,
) -> list[CleanBatch]:
    """This data-parallel rank's micro-batches of a global batch.

    Micro-batch j of rank r takes the slots (j * data_size + r) * micro_batch_size onwards, so every split of a
    global batch sees the same rows. Under `length`, all rows are cut to their first `length` tokens.

    Raises:
        UserError: the global batch does not divide into micro-batches of this size over the ranks.
    """
    rows_per_round = micro_batch_size * data_size
    if position.global_batch_size % rows_per_round:
        raise UserError(
            f"train.global_batch_size {position.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{micro_batch_size} x data-parallel size {data_size}"
        )
    batches = []
    for slot in range(data_rank * micro_batch_size, position.global_batch_size, rows_per_round):
        first = position.first_sample_index + slot
        rows = stream.rows(range(first, first + micro_batch_size))
        if length is not None:
            rows = cut(rows, length)
        batches.append(CleanBatch(**vars(rows), position=position))
    return batches


def cut(rows: Rows, length: int) -> Rows:
    """The first `length` tokens of every row; damage beyond them counts as seen all the same."""
    if length >= rows.tokens_BL.shape[1]:
        return rows
    assert rows.cu_seqlens is not None
    return replace(
        rows,
        tokens_BL=np.ascontiguousarray(rows.tokens_BL[:, :length]),
        is_maskable_BL=np.ascontiguousarray(rows.is_maskable_BL[:, :length]),
        cu_seqlens=[np.append(cuts[cuts < length], np.int32(length)) for cuts in rows.cu_seqlens],
        content_B=None if rows.content_B is None else np.minimum(rows.content_B, length),
    )


class Prefetcher(Generic[T]):
    """Iterates over another iterator that runs ahead in a background thread.

    Items come out unchanged and in order, whatever the depth. An exception of the inner iterator is raised at the
    place where its next item would have come. Close it when done: that ends the thread.
    """

    def __init__(self, items: Iterator[T], *, depth: int) -> None:
        """Start reading.

        Args:
            items: what to read; used by the thread alone from here on.
            depth: items that may wait; 0 reads in the caller's thread.
        """
        self._items = items
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True) if depth else None
        if self._thread is not None:
            self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise UserError("the prefetcher is closed")
        if self._thread is None:
            return next(self._items)
        if self._end is None:
            kind, item = self._queue.get()
            if kind == "item":
                return item
            self._end = item
        raise self._end

    def close(self) -> None:
        """End the thread and the inner iterator; waiting items are dropped. May be called twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        elif isinstance(self._items, Generator):
            self._items.close()

    def _read(self) -> None:
        try:
            for item in self._items:
                self._put("item", item)
                if self._stop.is_set():
                    break
            else:
                self._put("end", StopIteration())
        except BaseException as error:  # handed on to the consumer
            self._put("end", error)
        finally:
            if isinstance(self._items, Generator):
                self._items.close()

    def _put(self, kind: str, item: Any) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put((kind, item), timeout=0.1)
                return
            except queue.Full:
                continue

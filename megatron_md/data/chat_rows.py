"""Rows of chat corpora: a dialogue per row, padded, or several whole ones, packed. Only answers are maskable.

Behind a dialogue come `<eos>` that count as answers (`data.chat.eos_padding`), as many as the row has room for or some
or none, and then padding, which is neither scored nor seen by attention: it would tell where the answer ends.

Row g of a run is row g mod R of the corpus in the order of epoch g div R, R being the rows of an epoch: the dialogues,
or the bins of a packing that is the same in every epoch. The order is a permutation that depends on (manifest hash,
seed, epoch) alone, so any g is found at once. The lengths of all documents are kept in memory (8 bytes each, as much
again for every order that is in use), which tens of millions of them allow.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_md.batch import BoolArray, DamagedDocument, Int32Array, Int64Array, Rows
from megatron_md.config import ChatConfig
from megatron_md.data import stream
from megatron_md.data.bins import group_by_length, pack
from megatron_md.data.packing import permutation
from megatron_md.data.shards import DamagedDocumentError, Manifest, ShardReader
from megatron_md.data.subset import choose
from megatron_md.errors import UserError

_OPEN_SHARDS = 256  # each keeps a file open; rows come from all over the corpus

logger = logging.getLogger("megatron_md")


def document_lengths(manifest: Manifest) -> Int64Array:
    """Tokens of every document, shard by shard: int64 [documents].

    Raises:
        ShardError: a shard or its index is missing or damaged.
    """
    shards = range(len(manifest.shards))
    return np.concatenate([ShardReader(manifest, number).index["tokens"] for number in shards]).astype(np.int64)


def too_long(manifest: Manifest, lengths_D: Int64Array, seq_length: int) -> str | None:
    """One line about the dialogues that are longer than a row, None where all fit: they are never cut."""
    is_long_D = lengths_D > seq_length
    if not is_long_D.any():
        return None
    document, others = int(is_long_D.argmax()), int(is_long_D.sum()) - 1
    shard, number = _find(_first_documents(manifest), document)
    return (
        f"{manifest.location}: document {number} of {manifest.shards[shard].name} has {lengths_D[document]} tokens, "
        f"more than data.seq_length {seq_length}{f' (and {others} more)' if others else ''}: raise it (the "
        f"longest has {lengths_D.max()}), or build the corpus again with --max-tokens {seq_length}"
    )


class DialogueStream:
    """Rows of a chat corpus, addressed by `sample_index` g = 0, 1, 2, …, without end; a `RowStream`.

    As stateless as `SequenceStream`, and not to be used from two threads at once either. Every row has L tokens; where
    rows are padded, what lies behind `row_lengths` is padding that may be cut off. Dialogues are documents of
    `cu_seqlens`, each with the `<eos>` behind it, and what is left of a row is a last one.

    Attributes:
        manifest: the corpus.
        subset: the dialogues of it that are served.
        max_tokens: what they were chosen by.
        seq_length: tokens per row (L), which every dialogue fits in.
        rows_per_epoch: rows of every epoch (R).
        is_ragged: rows may be cut to the longest of their global batch.
    """

    def __init__(
        self,
        manifest: Manifest,
        chat: ChatConfig,
        *,
        seed: int,
        seq_length: int,
        keep_going: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        """Open a corpus.

        Args:
            manifest: the corpus.
            chat: how rows are made.
            seed: seed of the order.
            seq_length: tokens per row (L).
            keep_going: a damaged dialogue becomes a gap in its row (padding, not maskable) instead of an error.
            max_tokens: serve dialogues with so many tokens in all, the same for every seed; None serves all.

        Raises:
            UserError: a dialogue is longer than a row; or see `megatron_md.data.subset.choose`.
            ShardError: a shard or its index is missing or damaged.
        """
        self.manifest, self.seq_length, self.is_ragged = manifest, seq_length, not chat.is_packed
        self._chat, self._seed, self._keep_going = chat, seed, keep_going
        self.max_tokens, self.subset = max_tokens, choose(manifest, max_tokens)
        self._first_documents = _first_documents(manifest)
        self._lengths_D = document_lengths(manifest)
        if problem := too_long(manifest, self._lengths_D, seq_length):
            raise UserError(problem)
        most = {"answer": chat.eos_cap or seq_length, "one": 1, "ignore": 0}
        self._most_eos = most[chat.padding]
        self._key = (manifest.sha256, seed)
        self._lay_out()
        self._left_out: set[int] = set()
        self._reader = lru_cache(maxsize=_OPEN_SHARDS)(lambda shard: ShardReader(manifest, shard))
        self._order = lru_cache(maxsize=2)(self._order_of)

    def _lay_out(self) -> None:
        """Which documents a row holds, and how many tokens of it are not mere padding."""
        least_eos = self._chat.eos_cap or min(self._most_eos, 1)
        sizes = [shard.documents for shard in self.manifest.shards]
        taken = self.subset.numbers(range(len(sizes)), sizes)
        if self.is_ragged:
            self._documents, self._starts = taken, np.arange(len(taken) + 1)
            self._lengths_R = np.minimum(self._lengths_D[taken] + least_eos, self.seq_length)
        else:
            # Of equal documents, those that share a row are any.
            order = taken[permutation(len(taken), "packing", *self._key)]
            sizes_D = np.minimum(self._lengths_D + self._most_eos, self.seq_length)
            packed, self._starts = pack(sizes_D[order], self.seq_length)
            self._documents = order[packed]
            self._lengths_R = np.full(len(self._starts) - 1, self.seq_length)
        self.rows_per_epoch = len(self._starts) - 1

    def rows(self, sample_index: Sequence[int] | Int64Array) -> Rows:
        """The rows of these g, in this order.

        Raises:
            ShardError: a dialogue that they need is damaged (without `keep_going`), or a whole shard; names it.
        """
        count = len(sample_index)
        tokens_BL = np.full((count, self.seq_length), self.manifest.pad_id, dtype=np.int64)
        is_maskable_BL = np.zeros((count, self.seq_length), dtype=np.bool_)
        index_B = np.asarray(sample_index, dtype=np.int64)
        cu_seqlens: list[Int32Array] = []
        damaged: set[DamagedDocument] = set()
        for b, row in enumerate(self._rows_of(index_B).tolist()):
            boundaries = [0]
            for document in self._documents[self._starts[row] : self._starts[row + 1]].tolist():
                begin = boundaries[-1]
                size = self._fill(document, tokens_BL[b, begin:], is_maskable_BL[b, begin:])
                if size is None:
                    damaged.add(self._describe(document))
                    size = min(int(self._lengths_D[document]) + self._most_eos, self.seq_length - begin)
                boundaries.append(begin + size)
            if boundaries[-1] < self.seq_length:
                boundaries.append(self.seq_length)
            cu_seqlens.append(np.array(boundaries, dtype=np.int32))
        return Rows(
            tokens_BL,
            is_maskable_BL,
            index_B,
            cu_seqlens=cu_seqlens,
            damaged=frozenset(damaged),
            counts_documents=not self.is_ragged,
            content_B=np.array([cuts[1] for cuts in cu_seqlens], dtype=np.int64) if self.is_ragged else None,
        )

    def row_lengths(self, sample_index: Sequence[int] | Int64Array) -> Int64Array:
        """How many tokens of each of these rows must be served: int64 [B]."""
        return np.asarray(self._lengths_R[self._rows_of(np.asarray(sample_index, dtype=np.int64))])

    def state(self, rows: int) -> dict[str, Any]:
        """See `RowStream.state`."""
        chat = {"corpus": self.manifest.sha256, "seed": self._seed, "seq_length": self.seq_length}
        chat["data.max_tokens"] = self.max_tokens
        settled = replace(self._chat, eos_padding=self._chat.padding)
        # Where rows are cut to is no matter of theirs.
        return {**chat, **{f"data.chat.{key}": value for key, value in asdict(settled).items() if key in _OF_ROWS}}

    def quarantine(self, documents: Iterable[DamagedDocument]) -> None:
        """Leave these documents out from here on without looking at them; those of other corpora do not matter."""
        numbers = {shard.name: number for number, shard in enumerate(self.manifest.shards)}
        for damaged in documents:
            if damaged.corpus == self.manifest.sha256:
                self._left_out.add(self._first_documents[numbers[damaged.shard]] + damaged.document)

    def _rows_of(self, index_B: Int64Array) -> Int64Array:
        """Numbers of the corpus' rows that these g are."""
        epoch_B, place_B = np.divmod(index_B, self.rows_per_epoch)
        row_B = np.empty_like(index_B)
        for epoch in np.unique(epoch_B).tolist():
            is_here_B = epoch_B == epoch
            row_B[is_here_B] = self._order(epoch)[place_B[is_here_B]]
        return row_B

    def _order_of(self, epoch: int) -> Int64Array:
        order_R = permutation(self.rows_per_epoch, "dialogues", *self._key, epoch)
        if self._chat.group_by_length is None:
            return order_R
        return group_by_length(order_R, self._lengths_R, self._chat.group_by_length, *self._key, epoch)

    def _fill(self, document: int, tokens_n: Int64Array, is_maskable_n: BoolArray) -> int | None:
        """Write a dialogue and its `<eos>` to the beginning of a row's rest; how many tokens, None if it is damaged."""
        if document in self._left_out:
            return None
        shard, number = _find(self._first_documents, document)
        reader = self._reader(shard)
        try:
            found, answers = reader.document(number), reader.answers(number)
        except DamagedDocumentError as error:
            if not self._keep_going:
                raise
            logger.warning("left out: %s", error)
            self._left_out.add(document)
            return None
        size = len(found)
        tokens_n[:size] = found
        for start, stop in answers.tolist():
            is_maskable_n[start:stop] = True
        stop = min(size + self._most_eos, len(tokens_n))
        tokens_n[size:stop], is_maskable_n[size:stop] = self.manifest.eos_id, True
        return stop

    def _describe(self, document: int) -> DamagedDocument:
        shard, number = _find(self._first_documents, document)
        tokens = int(self._lengths_D[document])
        return DamagedDocument(self.manifest.sha256, self.manifest.shards[shard].name, number, tokens)


_OF_ROWS = ("rows", "eos_padding", "eos_cap", "group_by_length")


def _first_documents(manifest: Manifest) -> list[int]:
    """Number of each shard's first document, and of all documents."""
    return np.cumsum([0, *(shard.documents for shard in manifest.shards)]).tolist()


def _find(first_documents: list[int], document: int) -> tuple[int, int]:
    """Shard of a document, and its number there."""
    shard = bisect_right(first_documents, document) - 1
    return shard, document - first_documents[shard]


def validation_rows(manifest: Manifest, chat: ChatConfig, *, seq_length: int, count: int, unit: int = 1) -> Rows:
    """A fixed set of distinct rows: the first `count` of the corpus' first epoch, or all where it holds fewer.

    Of a chat corpus these are dialogues, one per row, with a single `<eos>` behind (none where training ignores it):
    however training pads or packs, scored are the answers. Rows are as long as the longest, up to a multiple of `unit`.
    """
    if manifest.kind == "text":
        return stream.validation_rows(manifest, seq_length, count)
    single = ChatConfig(eos_padding="ignore" if chat.padding == "ignore" else "one")
    dialogues = DialogueStream(manifest, single, seed=stream.VALIDATION_SEED, seq_length=seq_length)
    index = range(min(count, dialogues.rows_per_epoch))
    longest = int(dialogues.row_lengths(index).max())
    return stream.cut(dialogues.rows(index), min(seq_length, -(-longest // unit) * unit))

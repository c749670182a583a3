"""`max_tokens`: the documents that a run sees of a corpus where that is not all of them.

Shards are taken in an order that depends on the corpus alone: whole ones as long as they fit, then of the next one its
documents, also in such an order, up to the first that does not fit. So every seed sees the same documents, fewer tokens
are a part of more, and of all other shards nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_md.batch import Int64Array
from megatron_md.data.packing import permutation
from megatron_md.data.shards import Manifest, ShardReader
from megatron_md.errors import UserError


@dataclass(frozen=True)
class Subset:
    """Documents of a corpus: whole shards, and at most one in part.

    Attributes:
        shards: their numbers, ascending.
        shard_tokens: tokens [shards] that are taken of each, without `<eos>`.
        shard_documents: documents [shards] that are taken of each.
        part: number of the shard that is taken in part, if there is one, and which of its documents are, ascending.
    """

    shards: Int64Array
    shard_tokens: Int64Array
    shard_documents: Int64Array
    part: tuple[int, Int64Array] | None = None

    @property
    def tokens(self) -> int:
        """Unique tokens, without `<eos>`."""
        return int(self.shard_tokens.sum())

    @property
    def documents(self) -> int:
        """How many there are."""
        return int(self.shard_documents.sum())

    def numbers(self, shards: Sequence[int], sizes: Sequence[int]) -> Int64Array:
        """The documents that are taken, counted through all documents of these shards, of which some may be left out.

        Args:
            shards: numbers of the shards.
            sizes: how many documents each of them holds.
        """
        first, taken = 0, []
        for shard, size, is_taken in zip(shards, sizes, np.isin(shards, self.shards), strict=True):
            if self.part is not None and self.part[0] == shard:
                taken.append(first + self.part[1])
            elif is_taken:
                taken.append(np.arange(first, first + size))
            first += size
        return np.concatenate(taken)


def choose(manifest: Manifest, max_tokens: int | None) -> Subset:
    """The first documents of a corpus with at most so many tokens in all; see above.

    Raises:
        UserError: the corpus holds fewer tokens, or the first document more.
        ShardError: the shard that is taken in part, or its index, is missing or damaged.
    """
    tokens = np.array([shard.tokens for shard in manifest.shards], dtype=np.int64)
    documents = np.array([shard.documents for shard in manifest.shards], dtype=np.int64)
    if max_tokens is None or max_tokens == manifest.tokens:
        return Subset(np.arange(len(tokens)), tokens, documents)
    if max_tokens > manifest.tokens:
        raise UserError(
            f"max_tokens {max_tokens} is more than the {manifest.tokens} of {manifest.location}: leave it out"
        )
    order = permutation(len(tokens), "subset", manifest.sha256)
    totals = np.cumsum(tokens[order])
    whole = int(np.searchsorted(totals, max_tokens, side="right"))
    last = int(order[whole])
    left = max_tokens - (int(totals[whole - 1]) if whole else 0)
    part, found = _first_documents(manifest, last, left) if left else (np.arange(0), 0)
    shards = order[:whole] if not len(part) else order[: whole + 1]
    if not len(shards):
        raise UserError(
            f"max_tokens {max_tokens}: the first document of {manifest.location} has {found}: raise it to that"
        )
    tokens[last], documents[last] = found, len(part)
    shards = np.sort(shards)
    return Subset(shards, tokens[shards], documents[shards], (last, part) if len(part) else None)


def _first_documents(manifest: Manifest, shard: int, most: int) -> tuple[Int64Array, int]:
    """Documents of a shard with at most so many tokens, and how many these have; of none what the first one has."""
    lengths = ShardReader(manifest, shard).index["tokens"].astype(np.int64)
    order = permutation(len(lengths), "subset", manifest.sha256, shard)
    totals = np.cumsum(lengths[order])
    count = int(np.searchsorted(totals, most, side="right"))
    return np.sort(order[:count]), int(totals[max(0, count - 1)])

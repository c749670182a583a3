"""The (n, k) parity task as rows of the ordinary loader interface.

Bits are tokens 0 (x = 1) and 1 (x = -1). A row holds the n bits of an input x and, at its last position, the label
y = prod_{i in S} x_i, that is, the exclusive or of the secret bits S.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_md.batch import DamagedDocument, Int64Array, Rows
from megatron_md.diffusion.corruption import random_words
from megatron_md.parity.config import ParityConfig

UInt64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class ParityTask:
    """A secret set with its training and held-out inputs, all functions of the seed.

    Attributes:
        n: bits of an input.
        secret: the positions S, ascending.
        train_tokens: [N, n + 1] rows of the training set; None where every row is fresh.
        valid_tokens: [V, n + 1] held-out rows.
        seed: what all of it was drawn from.
    """

    n: int
    secret: tuple[int, ...]
    train_tokens: Int64Array | None
    valid_tokens: Int64Array
    seed: int

    @classmethod
    def of(cls, config: ParityConfig) -> ParityTask:
        """The task of a (checked) config."""
        task, seed = config.task, config.task_seed
        secret = secret_positions(seed, task.n, task.k)
        inputs = distinct_inputs(seed, task.n, task.valid_samples + (task.train_samples or 0))
        valid, train = np.split(inputs, [task.valid_samples])
        return cls(
            task.n,
            secret,
            None if task.train_samples is None else rows_of_inputs(train, task.n, secret),
            rows_of_inputs(valid, task.n, secret),
            seed,
        )

    @property
    def signal_positions(self) -> tuple[int, ...]:
        """S': the secret positions and the label's."""
        return (*self.secret, self.n)

    def fresh(self, first: int, count: int) -> Int64Array:
        """Rows first .. first + count - 1 of an endless stream of random inputs, none of them held out."""
        inputs = random_words(self.seed, "parity/fresh", (), count, start=first) >> np.uint64(64 - self.n)
        is_held_out = np.isin(inputs, self._held_out)
        while np.any(is_held_out):
            inputs = np.where(is_held_out, (inputs + np.uint64(1)) % np.uint64(2**self.n), inputs)
            is_held_out = np.isin(inputs, self._held_out)
        return rows_of_inputs(inputs, self.n, self.secret)

    @property
    def _held_out(self) -> UInt64Array:
        powers = np.uint64(1) << np.arange(self.n, dtype=np.uint64)
        return np.asarray(self.valid_tokens[:, :-1].astype(np.uint64) @ powers, dtype=np.uint64)


def secret_positions(seed: int, n: int, k: int) -> tuple[int, ...]:
    """Positions of k of n bits, ascending; all subsets equally likely."""
    order = np.argsort(random_words(seed, "parity/secret", (), n), kind="stable")
    return tuple(sorted(order[:k].tolist()))


def distinct_inputs(seed: int, n: int, count: int) -> UInt64Array:
    """`count` different numbers below 2^n: a random sample without replacement; more of them begin with the same."""
    assert count <= 2**n
    found = np.empty(0, dtype=np.uint64)
    start, size = 0, max(count, 1024)
    while len(found) < count:
        words = random_words(seed, "parity/inputs", (), size, start=start) >> np.uint64(64 - n)
        every = np.concatenate([found, words])
        found = every[np.sort(np.unique(every, return_index=True)[1])]
        start += size
    return found[:count]


def rows_of_inputs(inputs: UInt64Array, n: int, secret: Sequence[int]) -> Int64Array:
    """Tokens [B, n + 1] of inputs (bit i is position i), each with its label."""
    bits_BL = ((inputs[:, None] >> np.arange(n, dtype=np.uint64)) & np.uint64(1)).astype(np.int64)
    label_B = bits_BL[:, list(secret)].sum(axis=1) % 2
    return np.concatenate([bits_BL, label_B[:, None]], axis=1)


class ParityStream:
    """A task's training rows as a `RowStream`: epochs of the training set, each in its own order, or fresh rows."""

    is_ragged = False

    def __init__(self, task: ParityTask, *, seed: int) -> None:
        """Serve `task` in the order that `seed` gives."""
        self.task, self._seed = task, seed
        self._order = lru_cache(maxsize=4)(self._order_of_epoch)

    def rows(self, sample_index: Sequence[int] | Int64Array) -> Rows:
        """The rows of these g, in this order."""
        index_B = np.asarray(sample_index, dtype=np.int64)
        tokens_BL = self._fresh(index_B) if self.task.train_tokens is None else self._of_epochs(index_B)
        length = tokens_BL.shape[1]
        return Rows(
            tokens_BL,
            np.ones(tokens_BL.shape, dtype=np.bool_),
            index_B,
            cu_seqlens=[np.array([0, length], dtype=np.int32)] * len(index_B),
        )

    def row_lengths(self, sample_index: Sequence[int] | Int64Array) -> Int64Array:
        """Length n + 1 for each."""
        return np.full(len(sample_index), self.task.n + 1)

    def state(self, rows: int) -> dict[str, Any]:
        """What the rows depend on, the first `rows` as all others."""
        size = None if self.task.train_tokens is None else len(self.task.train_tokens)
        return {
            "parity": [self.task.n, *self.task.secret],
            "samples": size,
            "task_seed": self.task.seed,
            "seed": self._seed,
        }

    def quarantine(self, documents: Iterable[DamagedDocument]) -> None:
        """There are no documents that could be damaged."""

    def _fresh(self, index_B: Int64Array) -> Int64Array:
        first = int(index_B.min())
        return self.task.fresh(first, int(index_B.max()) - first + 1)[index_B - first]

    def _of_epochs(self, index_B: Int64Array) -> Int64Array:
        assert self.task.train_tokens is not None
        size = len(self.task.train_tokens)
        number_B = np.empty_like(index_B)
        for epoch in np.unique(index_B // size).tolist():
            is_here_B = index_B // size == epoch
            number_B[is_here_B] = self._order(epoch)[index_B[is_here_B] % size]
        return self.task.train_tokens[number_B]

    def _order_of_epoch(self, epoch: int) -> Int64Array:
        assert self.task.train_tokens is not None
        words = random_words(self._seed, "parity/order", (epoch,), len(self.task.train_tokens))
        return np.argsort(words, kind="stable")

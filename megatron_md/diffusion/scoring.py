"""What a likelihood is taken of and by: the rows that are scored, and the model behind one call.

Shape letters: R rows of the whole evaluation, C rows of a chunk of it, B rows of a micro-batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_md.batch import BatchPosition, BoolArray, CleanBatch, CorruptedBatch, Int32Array, Int64Array
from megatron_md.errors import UserError


class Scorer(Protocol):
    """A model on any layout, or none; every rank makes the same calls with its own rows.

    Attributes:
        causal: it attends to the left only, so that it scores shifted rows.
        right_shift: its outputs predict the next token, so that nothing predicts a row's first one.
        within_document: its attention keeps the documents of a row apart.
        block_size: of a block model, which scores rows in blocks; None for all others.
        micro_batch_size: rows of every batch.
        data_rank: which share of the rows is this rank's.
        data_size: number of shares.
    """

    causal: bool
    right_shift: bool
    within_document: bool
    block_size: int | None
    micro_batch_size: int
    data_rank: int
    data_size: int

    def negative_log_likelihoods(self, batches: Sequence[CorruptedBatch]) -> list[npt.NDArray[Any]] | None:
        """Each batch's nll_M in nats; None on ranks that do not hold the last pipeline stage."""

    def sum_over_ranks(self, figures: torch.Tensor) -> torch.Tensor:
        """Sum over the data-parallel ranks, given to every rank (on the CPU)."""


class GuidedScorer(Scorer, Protocol):
    """A model whose logits can be guided as well."""

    def guided_negative_log_likelihoods(
        self, batches: Sequence[CorruptedBatch], without_prompt: Sequence[Int64Array], guidance: float
    ) -> list[npt.NDArray[Any]] | None:
        """Each batch's nll_M in nats under `proposal.guide` of two logits; None as in `negative_log_likelihoods`.

        Args:
            batches: what is predicted where.
            without_prompt: each one's model input again, its prompts masked.
            guidance: w.
        """


@dataclass(frozen=True)
class ScoredRows:
    """Rows whose likelihood is wanted.

    Attributes:
        tokens_RL: token ids.
        is_maskable_RL: tokens that are scored.
        bytes: bytes of text behind the scored tokens (none for `<eos>`), for bits per byte.
        cu_seqlens: per row the boundaries of its documents, for models whose attention keeps them apart.
        words: words of the text behind them, where the rows hold all of it.
        is_apart: every model keeps the documents apart, also one that attends to whole rows: a dialogue's likelihood
            does not depend on the padding behind it.
    """

    tokens_RL: Int64Array
    is_maskable_RL: BoolArray
    bytes: int | None = None
    cu_seqlens: list[Int32Array] | None = None
    words: int | None = None
    is_apart: bool = False

    def __post_init__(self) -> None:
        if not self.is_maskable_RL.any():
            raise UserError("the rows hold no token to score (only padding or quarantined tokens)")

    @property
    def maskable_R(self) -> Int64Array:
        """Scored tokens n of each row."""
        return np.asarray(np.count_nonzero(self.is_maskable_RL, axis=1), dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and of which are scored."""
        digest = hashlib.blake2b(str(self.tokens_RL.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.tokens_RL, dtype="<i8").tobytes())
        digest.update(np.packbits(self.is_maskable_RL).tobytes())
        return digest.hexdigest()

    def micro_batches(self, index_C: Int64Array, scorer: Scorer) -> Iterator[tuple[CleanBatch, BoolArray]]:
        """One data-parallel rank's share of some rows, in micro-batches of one size: (batch, is_real_B).

        Args:
            index_C: numbers of the rows to serve.
            scorer: how large micro-batches are, and which share is this rank's. The last ones are filled up with rows
                that hold nothing to score.
        """
        size, data_size = scorer.micro_batch_size, scorer.data_size
        for number in range(math.ceil(len(index_C) / (size * data_size))):
            place_B = (number * data_size + scorer.data_rank) * size + np.arange(size)
            is_real_B = place_B < len(index_C)
            index_B = index_C[np.where(is_real_B, place_B, 0)]
            is_maskable_BL = self.is_maskable_RL[index_B] & is_real_B[:, None]
            boundaries = None
            if (scorer.within_document or self.is_apart) and self.cu_seqlens is not None:
                boundaries = [self.cu_seqlens[row] for row in index_B.tolist()]
            position = BatchPosition(0, len(self.tokens_RL))
            yield (
                CleanBatch(self.tokens_RL[index_B], is_maskable_BL, index_B, position, cu_seqlens=boundaries),
                is_real_B,
            )

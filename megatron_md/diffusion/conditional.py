"""log p(answer | prompt) of a denoiser: which answer tokens are masked, and how the draws add up.

Monte Carlo (LLaDA, Nie et al. 2025): with n answer tokens and l ~ U{1..n} of them masked,

    log p(answer | prompt)  >=  -E_l E_{sets of l tokens} [ n/l * sum of the masked tokens' cross-entropies ]

the NELBO of the answer (nelbo.py), with the prompt always visible. In a minibatch of b draws l is evenly spaced over
1..n from one random offset. Left to right instead adds up the chain rule, -log p(a_i | prompt, a_1 .. a_{i-1}) with all
tokens from i on masked: n forward passes, nothing random, the log-likelihood of the model that decodes in that order.
A block model masks l of the n answer tokens of each block, with n/l for each of them, and sees clean blocks before it.
With classifier-free guidance w the logits c of each copy become u + (1 + w)(c - u), where u are those of the copy whose
prompt is masked too (LLaDA's `cfg`). numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from megatron_md.batch import BatchPosition, BoolArray, CleanBatch, CorruptedBatch, Int64Array
from megatron_md.diffusion.blocks import with_clean_half
from megatron_md.diffusion.corruption import FloatArray, assemble, shift_right, uniforms
from megatron_md.errors import UserError

ConditionalMethod = Literal["monte_carlo", "left_to_right", "autoregressive"]


@dataclass(frozen=True)
class ConditionalEstimator:
    """How to estimate log p(answer | prompt).

    Attributes:
        method: `monte_carlo`, `left_to_right`, or `autoregressive` (exact, for causal models).
        draws: masked copies of an answer under `monte_carlo`; one suffices for an answer of one token.
        minibatch: draws that share one random offset of l.
        seed: of all draws.
        right_shift: for `autoregressive`: rows stay as they are, as the model's outputs predict the next token.
        guidance: w of classifier-free guidance against the masked prompt; 0 is off, more doubles the forward passes.
    """

    method: ConditionalMethod = "monte_carlo"
    draws: int = 128
    minibatch: int = 16
    seed: int = 0
    right_shift: bool = False
    guidance: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in get_args(ConditionalMethod):
            known = ", ".join(get_args(ConditionalMethod))
            raise UserError(f"unknown method {self.method!r} for a conditional log-likelihood (known: {known})")
        if self.draws < 1 or self.minibatch < 1:
            raise UserError(f"draws and minibatch must be at least 1, got {self.draws} and {self.minibatch}")
        if self.draws % self.minibatch:
            raise UserError(f"draws {self.draws} is not a multiple of minibatch {self.minibatch}")
        if not 0.0 <= self.guidance < math.inf:
            raise UserError(f"guidance must be 0 or a positive number, got {self.guidance}")
        if self.guidance and self.causal:
            raise UserError("guidance is for masked models: a causal one is scored exactly; leave guidance out")

    @property
    def causal(self) -> bool:
        """For causal models only."""
        return self.method == "autoregressive"


@dataclass(frozen=True)
class MaskedAnswers:
    """Copies of one prompt and answer as the model sees them. D copies, L positions.

    Attributes:
        clean_L: prompt and answer.
        tokens_DL: model input.
        is_scored_DL: where the clean token is to be predicted.
        weight_D: log p(answer | prompt) is minus the sum over copies of weight * (summed cross-entropy).
        minibatch: copies that belong together; those groups are independent of each other.
        weight_DL: of a block model, what each position's cross-entropy counts in its copy; None: 1.
        block_size: of a block model.
    """

    clean_L: Int64Array
    tokens_DL: Int64Array
    is_scored_DL: BoolArray
    weight_D: FloatArray
    minibatch: int
    weight_DL: FloatArray | None = None
    block_size: int | None = None

    def micro_batches(self, size: int) -> Iterator[CorruptedBatch]:
        """The copies in batches of `size`; the last one is filled up with copies that score nothing."""
        for start in range(0, len(self.tokens_DL), size):
            index_B = np.arange(start, start + size)
            is_real_B = index_B < len(self.tokens_DL)
            index_B = np.where(is_real_B, index_B, start)
            is_scored_BL = self.is_scored_DL[index_B] & is_real_B[:, None]
            clean = CleanBatch(np.tile(self.clean_L, (size, 1)), is_scored_BL, index_B, BatchPosition(0, size))
            masked = assemble(
                clean,
                tokens_BL=self.tokens_DL[index_B],
                is_scored_BL=is_scored_BL,
                weights_B=self.weight_D[index_B],
                denominator=1,
                mask_rate_B=np.ones(size),
            )
            yield masked if self.block_size is None else with_clean_half(masked, clean, self.block_size)

    def sums(self, nll_M: FloatArray, batch: CorruptedBatch, start: int) -> FloatArray:
        """Each copy's summed cross-entropy in a batch that begins with copy `start`: [B]."""
        row_M, column_M = np.divmod(batch.positions_M, batch.tokens_BL.shape[1])
        weight_M = None if self.weight_DL is None else self.weight_DL[start + row_M, column_M]
        weighted_M = nll_M if weight_M is None else nll_M * weight_M
        return np.bincount(row_M, weighted_M, minlength=len(batch.tokens_BL)).astype(np.float64)

    def log_likelihood(self, sum_D: FloatArray) -> tuple[float, float]:
        """Estimate and its standard error, from each copy's summed cross-entropy.

        The error is the spread of the minibatches: 0 where nothing is random, nan where there is only one of them.
        """
        estimates_G = self._estimates(sum_D)
        groups, mean = len(estimates_G), -float((self.weight_D * sum_D).sum())
        if not self.minibatch:
            return mean, 0.0
        return mean, float(estimates_G.std(ddof=1)) / math.sqrt(groups) if groups > 1 else math.nan

    def halves(self, sum_D: FloatArray) -> tuple[float, float]:
        """The estimates of the first and of the second half of the minibatches, independent of each other.

        Both are the whole where nothing is random, and nan where there is only one minibatch. Of an odd number the last
        is left out.
        """
        estimates_G = self._estimates(sum_D)
        half = len(estimates_G) // 2
        if not self.minibatch:
            return -float(estimates_G[0]), -float(estimates_G[0])
        if not half:
            return math.nan, math.nan
        return -float(estimates_G[:half].mean()), -float(estimates_G[half : 2 * half].mean())

    def _estimates(self, sum_D: FloatArray) -> FloatArray:
        """Of minus the log-likelihood, by each minibatch; one where nothing is random."""
        groups = len(sum_D) // self.minibatch if self.minibatch else 1
        estimates_G: FloatArray = groups * (self.weight_D * sum_D).reshape(groups, -1).sum(axis=1)
        return estimates_G


def evenly_spaced_counts(answer_length: int, minibatch: int, u: float) -> Int64Array:
    """Counts l = 1 + floor(n x), x = u, u + 1/b, ..., u + (b-1)/b around the unit circle; each l alone is uniform.

    Args:
        answer_length: n.
        minibatch: b.
        u: the offset, uniform in [0, 1).
    """
    x_B = (u + np.arange(minibatch) / minibatch) % 1.0
    return np.minimum(1 + np.floor(answer_length * x_B).astype(np.int64), answer_length)


def masked_answers(
    prompt: Sequence[int],
    answer: Sequence[int],
    estimator: ConditionalEstimator,
    *,
    mask_token_id: int,
    question: int = 0,
    block_size: int | None = None,
) -> MaskedAnswers:
    """The copies of a prompt and answer that the estimator wants scored.

    Draws hang on the seed, `question` and the position in the answer only: the choices of a question share their
    random numbers, so their differences are surer than they are.

    Args:
        prompt: tokens that are given; may be empty.
        answer: tokens to score.
        estimator: how.
        mask_token_id: what masked positions become (the BOS of a causal model).
        question: its number.
        block_size: of a block model.

    Raises:
        UserError: the answer is empty.
    """
    if not len(answer):
        raise UserError(f"question {question}: an answer without tokens has no likelihood")
    length = len(answer)
    clean_L = np.array([*prompt, *answer], dtype=np.int64)
    is_answer_L = np.arange(len(clean_L)) >= len(prompt)
    weight_DL: FloatArray | None = None
    if estimator.causal:
        tokens_DL = clean_L[None] if estimator.right_shift else shift_right(clean_L[None], mask_token_id)
        return MaskedAnswers(clean_L, tokens_DL, is_answer_L[None], np.ones(1), 0)
    if estimator.method == "left_to_right" or length == 1:
        place_D = len(prompt) + np.arange(length)[:, None]
        is_masked_DL = np.arange(len(clean_L)) >= place_D
        is_scored_DL = np.arange(len(clean_L)) == place_D
        weight_D, minibatch = np.ones(length), 0
    else:
        weight_DL = _monte_carlo_weights(len(prompt), length, estimator, question, block_size)
        is_scored_DL = is_masked_DL = weight_DL > 0.0
        weight_D, minibatch = np.full(estimator.draws, 1.0 / estimator.draws), estimator.minibatch
        if block_size is None:  # all of a copy's masked positions count the same
            weight_D, weight_DL = weight_DL.max(axis=1) / estimator.draws, None
    tokens_DL = np.where(is_masked_DL, mask_token_id, clean_L)
    return MaskedAnswers(clean_L, tokens_DL, is_scored_DL, weight_D, minibatch, weight_DL, block_size)


def _monte_carlo_weights(
    start: int, length: int, estimator: ConditionalEstimator, question: int, block_size: int | None
) -> FloatArray:
    """n/l at the l masked positions of each piece of n answer tokens, 0 elsewhere: [D, L].

    A piece is the answer from `start` on, or what of it lies in one block.
    """
    place_N = start + np.arange(length)
    cuts = np.flatnonzero(np.diff(place_N // (block_size or start + length))) + 1
    pieces, draws = np.split(np.arange(length), cuts), range(estimator.draws)
    groups = estimator.draws // estimator.minibatch
    offset_PG = uniforms(estimator.seed, "answer/offset", question, groups * len(pieces)).reshape(-1, groups)
    u_DN = np.stack([uniforms(estimator.seed, "answer/is_masked", (question, draw), length) for draw in draws])
    weight_DN = np.zeros((estimator.draws, length))
    for piece, offset_G in zip(pieces, offset_PG, strict=True):
        counts = [evenly_spaced_counts(len(piece), estimator.minibatch, float(u)) for u in offset_G]
        for draw, count in enumerate(np.concatenate(counts).tolist()):
            chosen = piece[np.argsort(u_DN[draw, piece], kind="stable")[:count]]
            weight_DN[draw, chosen] = len(piece) / count
    return np.pad(weight_DN, ((0, 0), (start, 0)))

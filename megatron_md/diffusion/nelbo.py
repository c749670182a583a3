"""The exact discrete NELBO of validation rows, with error bars.

For a row of n scored tokens and a denoiser p, averaging the chain rule over all orders of the tokens gives

    -log p(x) <= n * E_{l ~ U{1..n}} E_{l positions masked} [ mean over the masked i of -log p(x_i | the others) ]

(Uria et al. 2014; Ou et al. 2025), with equality when the conditionals belong to one joint law. So the value of a row
is its mean cross-entropy at exactly l masked positions: no weights, no smallest t. l is stratified over all validation
rows. Rows enter by their tokens: NELBO per token = sum_i n_i v_i / sum_i n_i. Functions of numpy arrays; the caller
gathers them from its ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_md.batch import BatchPosition, BoolArray, CleanBatch, CorruptedBatch, Int32Array, Int64Array
from megatron_md.diffusion.corruption import (
    FloatArray,
    assemble,
    mask_exact_count,
    maskable_count,
    stratified_uniforms,
    stratified_uniforms_of_rows,
)

_PURPOSE = "validation"


@dataclass(frozen=True)
class NelboEstimate:
    """A NELBO and how sure it is.

    Attributes:
        nelbo: nats per token.
        stderr: its standard error; nan with a single row.
        ppl_bound: exp(nelbo), an upper bound on the perplexity.
        tokens: scored tokens.
        rows: rows with any.
        ce_by_rate: mean cross-entropy of the rows whose l/n is in ((k-1)/K, k/K], k = 1..K; nan where there is none.
    """

    nelbo: float
    stderr: float
    ppl_bound: float
    tokens: int
    rows: int
    ce_by_rate: tuple[float, ...]


def purpose_of(randomisation: int) -> str:
    """Name of a pass' random numbers."""
    return f"{_PURPOSE}/{randomisation}"


def exact_counts(u_B: FloatArray, maskable_B: Int64Array) -> Int64Array:
    """Counts l = 1 + floor(n u) of rows with n maskable positions: uniform on 1..n for uniform u."""
    return np.minimum(1 + np.floor(u_B * maskable_B).astype(np.int64), maskable_B)


def exact_masks(batch: CleanBatch, count_B: Int64Array, *, seed: int, randomisation: int) -> BoolArray:
    """is_masked_BL with `count_B` maskable positions of each row, as its number and the pass decide."""
    streams: list[tuple[int, ...]] = [(int(i), randomisation) for i in batch.sample_index_B]
    return mask_exact_count(seed, streams, count_B, batch.is_maskable_BL, f"{_PURPOSE}/is_masked")


def micro_batches(
    tokens_RL: Int64Array,
    is_maskable_RL: BoolArray,
    index_C: Int64Array,
    *,
    size: int,
    data_rank: int = 0,
    data_size: int = 1,
    round_size: int = 1,
    cu_seqlens: Sequence[Int32Array] | None = None,
) -> Iterator[tuple[CleanBatch, BoolArray]]:
    """One data-parallel rank's share of some rows, in micro-batches of one size: (batch, is_real_B).

    Args:
        tokens_RL: all rows.
        is_maskable_RL: tokens that are scored.
        index_C: numbers of the rows to serve.
        size: rows of a micro-batch; the last ones are filled up with rows that hold nothing to score.
        data_rank: this rank.
        data_size: ranks that share the rows.
        round_size: the number of micro-batches is a multiple of it.
        cu_seqlens: boundaries of the documents of all rows, where they are known.
    """
    rounds = math.ceil(len(index_C) / (size * data_size))
    for number in range(-(-rounds // round_size) * round_size):
        place_B = (number * data_size + data_rank) * size + np.arange(size)
        is_real_B = place_B < len(index_C)
        index_B = index_C[np.where(is_real_B, place_B, 0)]
        is_maskable_BL = is_maskable_RL[index_B] & is_real_B[:, None]
        boundaries = None if cu_seqlens is None else [cu_seqlens[row] for row in index_B.tolist()]
        position = BatchPosition(0, len(tokens_RL))
        yield CleanBatch(tokens_RL[index_B], is_maskable_BL, index_B, position, boundaries), is_real_B


def stratum_order(rows: int, *, seed: int, randomisation: int = 0) -> Int64Array:
    """Validation row numbers sorted by the stratum that `exact_count_corruption` gave them: int64 [R]."""
    return np.argsort(stratified_uniforms(seed, 0, rows, purpose_of(randomisation)), kind="stable").astype(np.int64)


def exact_count_corruption(
    batch: CleanBatch, *, seed: int, mask_token_id: int, randomisation: int = 0
) -> CorruptedBatch:
    """Mask exactly l of each row's n maskable positions, l = 1 + floor(n u), u stratified over all validation rows.

    Args:
        batch: some of the validation rows; `sample_index_B` are their numbers i in 0..R-1 and
            `position.global_batch_size` is R (with `first_sample_index` 0).
        seed: the validation seed.
        mask_token_id: what masked positions become.
        randomisation: number of the pass; passes are independent.

    Returns:
        A batch with weights 1/l and the number of (non-empty) rows as its denominator: its loss is the mean of the
        row values. `mask_rate_B` is l/n.
    """
    assert batch.position.first_sample_index == 0, "validation rows are numbered from 0"
    n_B = maskable_count(batch)
    u_B = stratified_uniforms_of_rows(seed, batch, purpose_of(randomisation))
    count_B = exact_counts(u_B, n_B)
    is_masked_BL = exact_masks(batch, count_B, seed=seed, randomisation=randomisation)
    return assemble(
        batch,
        tokens_BL=np.where(is_masked_BL, mask_token_id, batch.tokens_BL),
        is_scored_BL=is_masked_BL,
        weights_B=1.0 / np.maximum(count_B, 1),
        denominator=int(np.count_nonzero(n_B)),
        mask_rate_B=count_B / np.maximum(n_B, 1),
    )


def row_values(nll_M: npt.NDArray[np.floating], corrupted: CorruptedBatch) -> FloatArray:
    """Mean cross-entropy over the scored positions of each row, 0 where there is none: float64 [B].

    Serves the autoregressive objective's batches as well: there it is the row's exact NLL per token.
    """
    rows, length = corrupted.tokens_BL.shape
    row_M = corrupted.positions_M // length
    sum_B = np.bincount(row_M, weights=nll_M.astype(np.float64), minlength=rows)
    return np.asarray(sum_B / np.maximum(np.bincount(row_M, minlength=rows), 1))


def estimate(
    values_R: FloatArray,
    maskable_R: Int64Array,
    mask_rate_R: npt.NDArray[np.floating],
    order_R: Int64Array | None,
    *,
    rate_bins: int = 10,
) -> NelboEstimate:
    """NELBO per token of all validation rows, its standard error, and the cross-entropy by mask rate.

    The standard error is that of paired strata: with the rows sorted by stratum and z_i = n_i (v_i - NELBO) / sum n,
    se^2 = sum_j (z_2j - z_2j-1)^2. Neighbours have almost the same l, so the variation of the value with l, which the
    strata remove, is not counted as an error. For equal n it is sum (y_2j - y_2j-1)^2 / R^2.

    Args:
        values_R: `row_values` of all rows, in the order of their numbers.
        maskable_R: n of each row.
        mask_rate_R: l/n of each row.
        order_R: `stratum_order`; None for exact values (autoregressive), whose error is that of the mean over rows.
        rate_bins: bins K of `ce_by_rate`.

    Raises:
        ValueError: there is no token to score.
    """
    tokens = int(maskable_R.sum())
    if tokens == 0:
        raise ValueError("the validation data holds no token to score (only padding or quarantined tokens)")
    sum_R = maskable_R * values_R
    nelbo = float(sum_R.sum() / tokens)
    order = np.arange(len(values_R)) if order_R is None else order_R
    order = order[maskable_R[order] > 0]
    residual_R = (maskable_R * (values_R - nelbo) / tokens)[order]
    return NelboEstimate(
        nelbo=nelbo,
        stderr=grouped_stderr(residual_R, len(order) if order_R is None else 2),
        ppl_bound=math.exp(nelbo) if nelbo < 700.0 else math.inf,
        tokens=tokens,
        rows=len(order),
        ce_by_rate=_ce_by_rate(sum_R, maskable_R, mask_rate_R, rate_bins),
    )


def grouped_stderr(residual_R: FloatArray, size: int) -> float:
    """Standard error of a sum of terms whose means agree within groups of `size` neighbours (the rest joins the last).

    A group of k terms contributes k / (k-1) * sum of squared deviations from its mean: (a - b)^2 for a pair.
    """
    if len(residual_R) < 2:
        return math.nan
    starts = range(0, len(residual_R) - size + 1, size)
    groups = np.split(residual_R, list(starts)[1:])
    variance = math.fsum(len(group) / (len(group) - 1) * float(np.sum((group - group.mean()) ** 2)) for group in groups)
    return math.sqrt(variance)


def _ce_by_rate(
    sum_R: FloatArray, maskable_R: Int64Array, mask_rate_R: npt.NDArray[np.floating], bins: int
) -> tuple[float, ...]:
    """Token-weighted mean value of the rows in each bin of the mask rate."""
    # A rate k/K that became fp32 may lie a rounding error above the edge it belongs to.
    bin_R = np.clip(np.ceil(mask_rate_R.astype(np.float64) * bins - 1e-5).astype(np.int64) - 1, 0, bins - 1)
    sums = np.bincount(bin_R, weights=sum_R, minlength=bins)
    tokens = np.bincount(bin_R, weights=maskable_R, minlength=bins)
    return tuple(float(s / n) if n > 0 else math.nan for s, n in zip(sums, tokens, strict=True))


def monte_carlo_stderr(nelbos: Sequence[float]) -> float:
    """Standard error of the mean of independently re-randomised NELBOs of the same rows: spread / sqrt(passes).

    It measures the randomness of the masks only, not that of the choice of rows.

    Raises:
        ValueError: fewer than 4 passes.
    """
    if len(nelbos) < 4:
        raise ValueError(f"a Monte Carlo standard error needs at least 4 randomisations, got {len(nelbos)}")
    return float(np.std(np.asarray(nelbos), ddof=1) / math.sqrt(len(nelbos)))

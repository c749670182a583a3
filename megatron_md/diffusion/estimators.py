"""Estimators of the NELBO: which positions of a row are masked in a pass, and how much each masked row counts.

With c(l) a row's mean cross-entropy at l masked positions, averaged over the sets of l positions, its NELBO per token
is the mean of c(1), ..., c(n) (nelbo.py). A pass of an estimator gives each row a value v = sum over its draws of
weight * (sum of the masked positions' cross-entropies), whose expectation is the target:

| estimator | draws of a row | target |
|---|---|---|
| `exact` | l masked, l ~ U{1..n} stratified over the rows; weight 1/l | NELBO |
| `complementary` | the same and the n - l others masked; 1/(2l), 1/(2(n-l)); one draw where l = n | NELBO |
| `neyman` | l ~ q stratified; 1/(n q(l) l) | NELBO |
| `stratified_t` | each position masked with t ~ U[eps, 1] stratified; 1/(n t) | mean of CE(t) over [eps, 1] |
| `plain` | the same, t independent for each row (LLaDA, MDLM) | mean of CE(t) over [eps, 1] |
| `autoregressive` | the row, shifted, for a causal model; 1/n | its exact NLL per token |

`complementary` scores every token once per pass; q proportional to the spread of v given l has the least variance under
stratification (Neyman 1934). `plain` at eps = 0 would have infinite variance. Everything is a function of the seed, the
row's number and the pass, so batches, ranks and restarts change nothing. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from megatron_md.batch import BoolArray, CleanBatch, CorruptedBatch, Int64Array
from megatron_md.diffusion.blocks import block_numbers, exact_block_masks, with_clean_half
from megatron_md.diffusion.corruption import (
    FloatArray,
    assemble,
    count_by,
    is_below_rate,
    mask_exact_count,
    maskable_count,
    shift_right,
    stratified_uniforms,
    uniforms,
)
from megatron_md.errors import UserError

EstimatorName = Literal["exact", "complementary", "neyman", "stratified_t", "plain", "autoregressive"]

_PURPOSE = "validation"


def exact_counts(u_B: FloatArray, maskable_B: Int64Array) -> Int64Array:
    """Counts l = 1 + floor(n u) of rows with n maskable positions: uniform on 1..n for uniform u."""
    return np.minimum(1 + np.floor(u_B * maskable_B).astype(np.int64), maskable_B)


def _pass(randomisation: int) -> str:
    """Name of a pass' random numbers."""
    return f"{_PURPOSE}/{randomisation}"


def _exact_masks(batch: CleanBatch, count_B: Int64Array, *, seed: int, randomisation: int) -> BoolArray:
    """is_masked_BL with `count_B` maskable positions of each row, as its number and the pass decide."""
    streams: list[tuple[int, ...]] = [(int(i), randomisation) for i in batch.sample_index_B]
    return mask_exact_count(seed, streams, count_B, batch.is_maskable_BL, f"{_PURPOSE}/is_masked")


@dataclass(frozen=True)
class Plan:
    """What one pass does with some rows, before any mask is drawn. D draws, B rows.

    Attributes:
        rate_DB: mask rate, l/n or t; 0 where there is no such draw.
        weight_DB: factor of the draw's summed cross-entropy in the row's value per token.
        stratum_B: the row's uniform in [0, 1) that its rate is a function of.
    """

    rate_DB: FloatArray
    weight_DB: FloatArray
    stratum_B: FloatArray


@dataclass(frozen=True)
class Estimator:
    """An estimator with its seed.

    Attributes:
        name: one of the table above.
        seed: of all draws.
        min_mask_rate: eps of `stratified_t` and `plain`.
        density: for `neyman`: q(l) up to a constant, by equal bins of the rate l/n.
        right_shift: for `autoregressive`: the rows stay as they are, as the model's outputs predict the next token.
        block_size: for `exact`, of a block model: l of each block's n tokens are masked, l stratified over all blocks
            of the rows, each weighted by n/l; a row's value is the mean over its tokens.
    """

    name: EstimatorName = "exact"
    seed: int = 0
    min_mask_rate: float = 1e-3
    density: tuple[float, ...] = ()
    right_shift: bool = False
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None and self.name != "exact":
            raise UserError(f"estimator {self.name!r} does not fit a block model; choose 'exact'")
        if self.name not in get_args(EstimatorName):
            raise UserError(f"unknown estimator {self.name!r} (known: {', '.join(get_args(EstimatorName))})")
        if not 0.0 < self.min_mask_rate < 1.0:
            raise UserError(f"min_mask_rate must be in (0, 1), got {self.min_mask_rate}")
        if (self.name == "neyman") != bool(self.density):
            raise UserError("a density belongs to the estimator neyman, which needs one (from a pilot pass)")
        if not all(0.0 < value < np.inf for value in self.density):
            raise UserError(f"the density must be positive in every bin, got {self.density}")

    @property
    def draws(self) -> int:
        """Masked copies of a row in a pass."""
        return 2 if self.name == "complementary" else 1

    @property
    def stratified(self) -> bool:
        """The rate is stratified over the rows of a pass."""
        return self.name not in ("plain", "autoregressive") and self.block_size is None

    @property
    def causal(self) -> bool:
        """For causal models only; there is nothing random about it."""
        return self.name == "autoregressive"

    def plan(self, index_B: Int64Array, maskable_B: Int64Array, rows: int, randomisation: int = 0) -> Plan:
        """Rates and weights of rows in a pass.

        Args:
            index_B: numbers of the rows, from 0.
            maskable_B: their maskable positions n.
            rows: rows R of the whole evaluation, over which rates are stratified.
            randomisation: number of the pass.
        """
        n_B = np.maximum(maskable_B, 1)
        is_real_B = maskable_B > 0
        if self.causal or self.block_size is not None:
            one_B = is_real_B.astype(np.float64)
            return Plan(one_B[None], (one_B / n_B)[None], np.zeros(len(index_B)))
        stratum_B = self._strata(index_B, rows, randomisation)
        if self.name in ("stratified_t", "plain"):
            t_B = self.min_mask_rate + (1.0 - self.min_mask_rate) * stratum_B
            return Plan((t_B * is_real_B)[None], (is_real_B / (n_B * t_B))[None], stratum_B)
        if self.name == "neyman":
            count_B, chance_B = self._neyman_counts(stratum_B, n_B)
            weight_B = is_real_B / (n_B * chance_B * count_B)
            return Plan((is_real_B * count_B / n_B)[None], weight_B[None], stratum_B)
        count_B = exact_counts(stratum_B, n_B)
        counts_DB = np.stack([count_B, n_B - count_B]) if self.name == "complementary" else count_B[None]
        counts_DB = counts_DB * is_real_B
        weight_DB = np.where(counts_DB > 0, 1.0 / np.maximum(counts_DB, 1), 0.0)
        return Plan(counts_DB / n_B, weight_DB / np.maximum((counts_DB > 0).sum(axis=0), 1), stratum_B)

    def corrupt(self, batch: CleanBatch, mask_token_id: int, randomisation: int = 0) -> list[CorruptedBatch]:
        """The masked rows of a pass, one batch for each draw.

        Args:
            batch: some of the rows; `sample_index_B` are their numbers i in 0..R-1, `position.global_batch_size` is R.
            mask_token_id: what masked positions become (the BOS of a causal model).
            randomisation: number of the pass; passes are independent.
        """
        if self.block_size is not None:
            return [self._corrupt_blocks(batch, mask_token_id, randomisation, self.block_size)]
        n_B = maskable_count(batch)
        plan = self.plan(batch.sample_index_B, n_B, batch.position.global_batch_size, randomisation)
        if self.causal:
            tokens_BL = batch.tokens_BL
            if not self.right_shift:
                tokens_BL = shift_right(tokens_BL, mask_token_id, batch.cu_seqlens)
            return [self._assemble(batch, tokens_BL, batch.is_maskable_BL, plan, 0)]
        if self.name in ("stratified_t", "plain"):
            is_masked_BL = is_below_rate(self._uniforms_BL(batch, randomisation), plan.rate_DB[0], batch.is_maskable_BL)
        else:
            count_B = np.rint(plan.rate_DB[0] * n_B).astype(np.int64)
            is_masked_BL = _exact_masks(batch, count_B, seed=self.seed, randomisation=randomisation)
        masks: list[BoolArray] = [is_masked_BL]
        if self.name == "complementary":
            masks.append(batch.is_maskable_BL & ~is_masked_BL)
        return [
            self._assemble(batch, np.where(is_masked, mask_token_id, batch.tokens_BL), is_masked, plan, draw)
            for draw, is_masked in enumerate(masks)
        ]

    def _corrupt_blocks(self, batch: CleanBatch, mask_token_id: int, randomisation: int, size: int) -> CorruptedBatch:
        """The rows with exactly l positions of each block masked, each with the weight n/l."""
        rows, length = batch.tokens_BL.shape
        blocks, purpose = -(-length // size), _pass(randomisation)
        number = block_numbers(rows, length, size)
        maskable_N = count_by(number, rows * blocks, batch.is_maskable_BL)
        u_RN = stratified_uniforms(self.seed, 0, batch.position.global_batch_size * blocks, purpose).reshape(-1, blocks)
        count_N = np.minimum(exact_counts(u_RN[batch.sample_index_B].reshape(-1), maskable_N), maskable_N)
        u_BL = np.stack(
            [
                uniforms(self.seed, f"{_PURPOSE}/is_masked", (int(i), randomisation), length)
                for i in batch.sample_index_B
            ]
        )
        is_masked_BL = exact_block_masks(count_N, batch.is_maskable_BL, u_BL, number)
        masked = assemble(
            batch,
            tokens_BL=np.where(is_masked_BL, mask_token_id, batch.tokens_BL),
            is_scored_BL=is_masked_BL,
            weights_B=maskable_N / np.maximum(count_N, 1),
            denominator=int(batch.is_maskable_BL.sum()),
            mask_rate_B=np.ones(rows),
            sequence_N=number,
        )
        return with_clean_half(masked, batch, size)

    def _strata(self, index_B: Int64Array, rows: int, randomisation: int) -> FloatArray:
        if self.stratified:
            return np.asarray(stratified_uniforms(self.seed, 0, rows, _pass(randomisation))[index_B])
        purpose = f"{_pass(randomisation)}/plain"
        return np.asarray(uniforms(self.seed, purpose, 0, rows)[index_B])

    def _uniforms_BL(self, batch: CleanBatch, randomisation: int) -> FloatArray:
        length = batch.tokens_BL.shape[1]
        purpose = f"{_pass(randomisation)}/bernoulli"
        return np.stack([uniforms(self.seed, purpose, int(i), length) for i in batch.sample_index_B])

    def _neyman_counts(self, u_B: FloatArray, n_B: Int64Array) -> tuple[Int64Array, FloatArray]:
        """Counts l by the inverse CDF of q at u, and q(l)."""
        density_K = np.asarray(self.density)
        count_B, chance_B = np.empty_like(n_B), np.empty(len(n_B))
        for n in np.unique(n_B).tolist():
            bin_l = ((np.arange(n) + 0.5) / n * len(density_K)).astype(np.int64)
            q_l = density_K[bin_l] / density_K[bin_l].sum()
            is_n_B = n_B == n
            index_N = np.minimum(np.searchsorted(np.cumsum(q_l), u_B[is_n_B], side="right"), n - 1)
            count_B[is_n_B], chance_B[is_n_B] = index_N + 1, q_l[index_N]
        return count_B, chance_B

    def _assemble(
        self, batch: CleanBatch, tokens_BL: Int64Array, is_scored_BL: BoolArray, plan: Plan, draw: int
    ) -> CorruptedBatch:
        return assemble(
            batch,
            tokens_BL=tokens_BL,
            is_scored_BL=is_scored_BL,
            weights_B=plan.weight_DB[draw],
            denominator=int(np.count_nonzero(plan.rate_DB[draw])),
            mask_rate_B=plan.rate_DB[draw],
        )


def neyman_density(
    values_X: FloatArray, rates_X: FloatArray, tokens_X: npt.NDArray[np.number], *, bins: int = 10, floor: float = 0.1
) -> tuple[float, ...]:
    """Spread of the value by rate, from a pilot's draws: the `density` of the estimator `neyman`.

    Args:
        values_X: mean cross-entropy of each draw, rows and passes of `exact` in any order.
        rates_X: l/n of each.
        tokens_X: n of each.
        bins: equal bins of the rate; one with fewer than two draws gets the mean of the others.
        floor: share of a uniform density mixed in, which bounds the weights by 1/floor.

    Raises:
        UserError: there are fewer than two draws in every bin.
    """
    bin_X = np.clip(np.ceil(rates_X * bins - 1e-9).astype(np.int64) - 1, 0, bins - 1)
    spread_K = np.full(bins, np.nan)
    for k in range(bins):
        values, weights = values_X[bin_X == k], tokens_X[bin_X == k].astype(np.float64)
        if len(values) > 1 and weights.sum() > 0:
            mean = np.average(values, weights=weights)
            spread_K[k] = np.sqrt(np.average((values - mean) ** 2, weights=weights))
    if np.isnan(spread_K).all():
        raise UserError(f"{len(values_X)} pilot draws are too few for {bins} bins of the mask rate")
    mean_spread = float(np.nanmean(spread_K))
    # A spread of rounding errors says nothing.
    is_spread = mean_spread > 1e-9 * float(np.abs(values_X).mean())
    relative_K = np.where(np.isnan(spread_K), 1.0, spread_K / mean_spread) if is_spread else np.ones(bins)
    return tuple(float(x) for x in (1.0 - floor) * relative_K + floor)

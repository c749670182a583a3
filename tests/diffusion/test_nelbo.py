from __future__ import annotations

import math

import numpy as np
import pytest
from peer_vectors import vector
from toy_posterior import ToyPosterior

from megatron_md.batch import BatchPosition, CleanBatch, CorruptedBatch
from megatron_md.config import ObjectiveConfig
from megatron_md.diffusion.nelbo import (
    NelboEstimate,
    estimate,
    exact_count_corruption,
    monte_carlo_stderr,
    row_values,
    stratum_order,
)
from megatron_md.diffusion.objective import build_objective

MASK = 50


def validation_rows(tokens_RL: np.ndarray, is_maskable_RL: np.ndarray | None = None) -> CleanBatch:
    rows = len(tokens_RL)
    is_maskable_RL = np.ones(tokens_RL.shape, dtype=bool) if is_maskable_RL is None else is_maskable_RL
    return CleanBatch(tokens_RL, is_maskable_RL, np.arange(rows), BatchPosition(0, rows))


def score(toy: ToyPosterior, row_R: np.ndarray, *, seed: int) -> tuple[NelboEstimate, np.ndarray]:
    """The estimate that the exact denoiser gets on some of the toy's sequences, and the row values."""
    batch = validation_rows(toy.tokens_XN[row_R])
    corrupted = exact_count_corruption(batch, seed=seed, mask_token_id=MASK)
    length = toy.tokens_XN.shape[1]
    set_R = (corrupted.tokens_BL == MASK) @ (1 << np.arange(length))
    row_M, column_M = corrupted.positions_M // length, corrupted.positions_M % length
    nll_M = toy.nll_XSN[row_R[row_M], set_R[row_M], column_M]
    values_R = row_values(nll_M, corrupted)
    order = stratum_order(len(row_R), seed=seed)
    return estimate(values_R, np.full(len(row_R), length), corrupted.mask_rate_B, order), values_R


def corrupt(batch: CleanBatch, randomisation: int = 0) -> CorruptedBatch:
    return exact_count_corruption(batch, seed=3, mask_token_id=MASK, randomisation=randomisation)


@pytest.mark.parametrize(("vocab", "length"), [(2, 4), (3, 4)])
def test_exact_denoiser_over_all_counts_and_masks_has_its_nll(vocab: int, length: int) -> None:
    toy = ToyPosterior(vocab, length)
    size_S = toy.is_masked_SN.sum(axis=1)
    mean_XS = toy.sum_XS / np.maximum(size_S, 1)
    per_count = [mean_XS[:, size_S == count].mean(axis=1) for count in range(1, length + 1)]
    np.testing.assert_allclose(np.mean(per_count, axis=0), toy.nll_X / length, rtol=1e-12)


def test_estimate_of_the_exact_denoiser_is_the_entropy_within_its_error() -> None:
    toy = ToyPosterior(3, 4)
    row_R = np.random.default_rng(0).choice(len(toy.law_X), size=4000, p=toy.law_X)
    result, _ = score(toy, row_R, seed=1)
    entropy = float(toy.law_X @ toy.nll_X) / 4
    assert abs(result.nelbo - entropy) < 3.5 * result.stderr
    assert result.stderr < 0.02 * entropy
    assert result.ppl_bound == pytest.approx(math.exp(result.nelbo))
    assert (result.tokens, result.rows) == (16000, 4000)


def test_paired_stderr_is_the_spread_of_repeated_estimates() -> None:
    # Copies of one token: it is unknown when all are masked and nearly known otherwise, so the value hangs on l.
    toy = ToyPosterior(3, 5, noise=0.02)
    generator = np.random.default_rng(7)
    repeats, rows = 400, 64
    nelbos, paired, naive = [], [], []
    for repeat in range(repeats):
        result, values_R = score(toy, generator.choice(len(toy.law_X), size=rows, p=toy.law_X), seed=repeat)
        nelbos.append(result.nelbo)
        paired.append(result.stderr**2)
        naive.append(np.var(values_R, ddof=1) / rows)
    spread, mean_paired = float(np.std(nelbos, ddof=1)), math.sqrt(np.mean(paired))
    # The spread of 400 draws is known within 1 / sqrt(2 * 400) = 3.5 %: three of that. Pairs straddle neighbouring
    # strata and so err upwards, by a little at 64 rows.
    assert mean_paired == pytest.approx(spread, rel=0.11)
    assert math.sqrt(np.mean(naive)) > 1.15 * spread  # the formula that ignores the strata


def test_re_randomised_passes_have_their_own_stderr() -> None:
    toy = ToyPosterior(2, 5)
    row_R = np.random.default_rng(0).choice(len(toy.law_X), size=32, p=toy.law_X)
    nelbos = [score(toy, row_R, seed=seed)[0].nelbo for seed in range(8)]
    expected = math.sqrt(sum((x - np.mean(nelbos)) ** 2 for x in nelbos) / 7 / 8)
    assert monte_carlo_stderr(nelbos) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least 4 randomisations, got 3"):
        monte_carlo_stderr(nelbos[:3])


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_uniform_model_has_log_v_exactly(rows: int) -> None:
    generator = np.random.default_rng(rows)
    is_maskable_RL = np.arange(20)[None] < generator.integers(1, 21, (rows, 1))
    batch = validation_rows(generator.integers(0, MASK, (rows, 20)), is_maskable_RL)
    corrupted = corrupt(batch)
    values_R = row_values(np.full(len(corrupted.positions_M), math.log(7)), corrupted)
    result = estimate(values_R, is_maskable_RL.sum(axis=1), corrupted.mask_rate_B, stratum_order(rows, seed=3))
    assert result.nelbo == pytest.approx(math.log(7), rel=1e-14)
    assert math.isnan(result.stderr) if rows == 1 else result.stderr < 1e-15
    loss = float(corrupted.weights_M.sum(dtype=np.float64)) * math.log(7) / corrupted.denominator
    assert loss == pytest.approx(math.log(7), rel=1e-6)


def test_log_likelihood_of_a_uniform_model_as_in_llada() -> None:
    case = vector("llada_loglik_uniform_model")
    inputs = case["inputs"]
    prompt, answer = inputs["prompt_len"], inputs["answer_len"]
    is_maskable_RL = np.tile(np.arange(prompt + answer) >= prompt, (inputs["mc_num"], 1))
    batch = validation_rows(np.zeros(is_maskable_RL.shape, dtype=np.int64), is_maskable_RL)
    corrupted = corrupt(batch)
    values_R = row_values(np.full(len(corrupted.positions_M), math.log(inputs["vocab"])), corrupted)
    result = estimate(values_R, is_maskable_RL.sum(axis=1), corrupted.mask_rate_B, stratum_order(8, seed=3))
    assert -answer * result.nelbo == pytest.approx(case["expected"], abs=case["tol"])


def test_counts_are_stratified_over_all_rows() -> None:
    corrupted = corrupt(validation_rows(np.zeros((40, 20), dtype=np.int64)))
    counts = (corrupted.tokens_BL == MASK).sum(axis=1)
    np.testing.assert_array_equal(np.bincount(counts, minlength=21), [0] + [2] * 20)
    np.testing.assert_allclose(corrupted.mask_rate_B, counts / 20, rtol=1e-6)
    np.testing.assert_array_equal(np.sort(counts), counts[stratum_order(40, seed=3)])


def test_every_set_of_masked_positions_is_equally_likely() -> None:
    rows = 6000
    corrupted = corrupt(validation_rows(np.zeros((rows, 4), dtype=np.int64)))
    is_masked_RL = corrupted.tokens_BL == MASK
    index_R = is_masked_RL @ (1 << np.arange(4))
    # Each count gets a quarter of the rows, divided evenly among its 4, 6, 4 and 1 sets.
    for s in range(1, 16):
        expected = rows / 4 / math.comb(4, int(s).bit_count())
        assert abs(np.count_nonzero(index_R == s) - expected) < 4.5 * math.sqrt(expected)


def test_masks_do_not_depend_on_the_layout_but_on_the_randomisation() -> None:
    batch = validation_rows(np.random.default_rng(0).integers(0, MASK, (10, 12)))
    whole = corrupt(batch)
    for chosen in ([0, 1, 2], [9, 4]):
        part = corrupt(
            CleanBatch(
                batch.tokens_BL[chosen], batch.is_maskable_BL[chosen], batch.sample_index_B[chosen], batch.position
            )
        )
        np.testing.assert_array_equal(part.tokens_BL, whole.tokens_BL[chosen])
    assert not np.array_equal(corrupt(batch, randomisation=1).tokens_BL, whole.tokens_BL)


def test_rows_of_unequal_length_enter_by_their_tokens() -> None:
    values, maskable = np.array([1.0, 2.0, 4.0, 0.0]), np.array([10, 20, 10, 0])
    result = estimate(values, maskable, np.array([0.1, 0.5, 1.0, 0.0]), np.array([2, 3, 0, 1]), rate_bins=2)
    assert result.nelbo == pytest.approx(90 / 40) and result.rows == 3
    # Bins (0, 1/2] and (1/2, 1], by tokens.
    assert result.ce_by_rate == pytest.approx((50 / 30, 4.0))
    # Three rows are one group: 3/2 of the squared deviations of n (v - nelbo) / sum n.
    residual = np.array([10 * 1.75, 10 * -1.25, 20 * -0.25]) / 40
    assert result.stderr == pytest.approx(math.sqrt(1.5 * np.sum((residual - residual.mean()) ** 2)))


def test_paired_formula_for_equal_rows() -> None:
    y = np.array([3.0, 1.0, 2.0, 5.0])
    result = estimate(y, np.full(4, 8), np.full(4, 0.5), np.array([1, 0, 3, 2]))
    assert result.stderr == pytest.approx(math.sqrt((2.0**2 + 3.0**2) / 16))
    assert math.isnan(result.ce_by_rate[0]) and result.ce_by_rate[4] == pytest.approx(2.75)


def test_causal_models_have_exact_values_and_the_error_of_the_mean() -> None:
    batch = validation_rows(np.random.default_rng(1).integers(0, MASK, (6, 5)))
    objective = build_objective(ObjectiveConfig(name="autoregressive"), seed=0, mask_token_id=MASK)
    corrupted = objective.corrupt(batch)
    nll_M = np.random.default_rng(2).random(30)
    values_R = row_values(nll_M, corrupted)
    np.testing.assert_allclose(values_R, nll_M.reshape(6, 5).mean(axis=1))
    result = estimate(values_R, np.full(6, 5), corrupted.mask_rate_B, None)
    assert result.nelbo == pytest.approx(nll_M.mean())
    assert result.stderr == pytest.approx(np.std(values_R, ddof=1) / math.sqrt(6))


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no token to score"):
        estimate(np.zeros(2), np.zeros(2, dtype=np.int64), np.zeros(2), np.arange(2))


def test_a_hopeless_model_has_an_infinite_bound() -> None:
    result = estimate(np.full(2, 1000.0), np.full(2, 3), np.full(2, 0.5), np.arange(2))
    assert result.ppl_bound == math.inf and result.nelbo == 1000.0

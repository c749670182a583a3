from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_md.diffusion.corruption import stratified_uniforms, uniforms
from megatron_md.diffusion.nelbo_error import curve, mask_stderr, total_stderr, weighted_mean

ROWS, REPEATS = 64, 400
LENGTHS = np.where(np.arange(ROWS) % 4 == 0, 10, 20)


def passes_of(seed: int, passes: int, stratified: bool, rows_seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Values that hang on the row, steeply on the rate, and on noise."""
    draw = stratified_uniforms if stratified else lambda s, first, rows, purpose: uniforms(s, purpose, 0, rows)
    u_PR = np.stack([draw(seed, 0, ROWS, f"pass {number}") for number in range(passes)])
    row_R = np.random.default_rng(rows_seed).normal(0.0, 0.5, ROWS)
    noise_PR = np.random.default_rng([7, seed]).normal(0.0, 0.3, u_PR.shape)
    return 2.0 + row_R + 3.0 * u_PR**2 + noise_PR, u_PR


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("passes", [2, 8])
def test_mask_stderr_is_the_spread_over_masks_of_the_same_rows(stratified: bool, passes: int) -> None:
    nelbos, found = [], []
    for seed in range(REPEATS):
        values_PR, u_PR = passes_of(seed, passes, stratified)
        nelbos.append(weighted_mean(values_PR, LENGTHS))
        found.append(mask_stderr(values_PR, u_PR if stratified else None, LENGTHS) ** 2)
    # The spread of 400 draws is known within 3.5 %: three of that, and bins wider than a stratum err upwards a little.
    assert math.sqrt(np.mean(found)) == pytest.approx(np.std(nelbos, ddof=1), rel=0.13)


def test_without_strata_the_error_is_much_larger() -> None:
    values_PR, u_PR = passes_of(0, 8, True)
    assert mask_stderr(values_PR, None, LENGTHS) > 2.5 * mask_stderr(values_PR, u_PR, LENGTHS)


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("passes", [1, 2])
def test_total_stderr_is_the_spread_over_rows_and_masks(stratified: bool, passes: int) -> None:
    nelbos, found = [], []
    for seed in range(REPEATS):
        values_PR, u_PR = passes_of(seed, passes, stratified, rows_seed=1000 + seed)
        nelbos.append(weighted_mean(values_PR, LENGTHS))
        found.append(total_stderr(values_PR, u_PR if stratified else None, LENGTHS) ** 2)
    assert math.sqrt(np.mean(found)) == pytest.approx(np.std(nelbos, ddof=1), rel=0.13)


def test_one_pass_over_one_row_knows_no_error() -> None:
    one = np.ones((1, 1))
    assert math.isnan(total_stderr(one, one / 2, np.array([5]))) and math.isnan(
        mask_stderr(one, one / 2, np.array([5]))
    )


def test_curve_by_hand() -> None:
    # Two passes of one draw each over three rows, the last of which holds nothing.
    ce_PDR = np.array([[[1.0, 2.0, 0.0]], [[3.0, 6.0, 0.0]]])
    rate_PDR = np.array([[[0.2, 0.5, 0.0]], [[0.4, 1.0, 0.0]]])
    low, high = curve(ce_PDR, rate_PDR, np.array([10, 30, 0]), bins=2)
    # Row 0 twice and row 1 once lie in (0, 1/2].
    assert low.ce == pytest.approx((10 * 1 + 10 * 3 + 30 * 2) / 50) and low.rows == 2
    assert low.rate == pytest.approx((10 * 0.2 + 10 * 0.4 + 30 * 0.5) / 50)
    residual_R = np.array([10 * (1 - low.ce) + 10 * (3 - low.ce), 30 * (2 - low.ce)]) / 50
    assert low.stderr == pytest.approx(math.sqrt(2 * np.sum(residual_R**2)))
    assert (high.ce, high.rows, high.rate) == (6.0, 1, 1.0) and math.isnan(high.stderr)


def test_rows_of_unequal_length_enter_by_their_tokens() -> None:
    values_PR, maskable_R = np.array([[1.0, 2.0, 4.0, 0.0]]), np.array([10, 20, 10, 0])
    assert weighted_mean(values_PR, maskable_R) == pytest.approx(90 / 40)
    rate_PDR = np.array([[[0.1, 0.5, 1.0, 0.0]]])
    # Bins (0, 1/2] and (1/2, 1], by tokens.
    assert [point.ce for point in curve(values_PR[:, None], rate_PDR, maskable_R, 2)] == pytest.approx([50 / 30, 4.0])
    # Three rows are one group: 3/2 of the squared deviations of n (v - nelbo) / sum n.
    residual = np.array([10 * 1.75, 10 * -1.25, 20 * -0.25]) / 40
    expected = math.sqrt(1.5 * np.sum((residual - residual.mean()) ** 2))
    assert total_stderr(values_PR, np.array([[0.7, 0.9, 0.1, 0.3]]), maskable_R) == pytest.approx(expected)


def test_paired_formula_for_equal_rows() -> None:
    values_PR, strata_PR = np.array([[3.0, 1.0, 2.0, 5.0]]), np.array([[0.3, 0.1, 0.9, 0.7]])
    assert total_stderr(values_PR, strata_PR, np.full(4, 8)) == pytest.approx(math.sqrt((2.0**2 + 3.0**2) / 16))

"""Paired differences: their value, the coverage of their intervals, Holm's correction, tokens to a NELBO."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_md.sweep.paired import holm, paired_difference, tokens_to_reach

ROWS = 96
RATE = (np.arange(ROWS) + 0.5) / ROWS


def test_the_mean_weighs_rows_by_their_tokens_and_leaves_empty_ones_out() -> None:
    tokens = np.array([4, 0, 1, 3])
    difference = np.array([[1.0, math.nan, 3.0, -1.0], [2.0, math.nan, 0.0, 0.0]])
    difference[:, 1] = 77.0
    found = paired_difference(difference, tokens, np.array([0.2, 0.9, 0.5, 0.7]))
    assert found.mean == pytest.approx(((4 + 3 - 3) / 8 + 8 / 8) / 2) and found.seeds == 2
    assert found.low <= found.mean <= found.high


def test_a_constant_difference_is_certain() -> None:
    found = paired_difference(np.full((3, ROWS), -0.25), np.full(ROWS, 8), RATE)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.25, -0.25, -0.25))
    assert found.p_value == pytest.approx(2 / 10_001), "no smaller p than the draws can show"


def test_what_hangs_on_the_rate_alone_is_no_noise() -> None:
    slope = 3.0 * (RATE - 0.5)[None] + np.zeros((3, 1))
    found = paired_difference(slope, np.full(ROWS, 8), RATE)
    naive = 1.96 * float(slope[0].std()) / math.sqrt(ROWS)
    assert found.mean == pytest.approx(0.0, abs=1e-9) and 0.0 < found.high < 0.25 * naive


@pytest.mark.parametrize(("seed_sd", "row_sd"), [(0.0, 1.0), (0.2, 0.0), (0.1, 1.0)])
def test_intervals_are_as_wide_as_the_variance_of_the_mean(seed_sd: float, row_sd: float) -> None:
    """Width against the known variance seed_sd^2 / S + row_sd^2 / R (rows shared by all seeds), on average."""
    random, widths = np.random.default_rng(1), []
    seeds = 4
    for _ in range(40):
        of_seed = seed_sd * random.standard_normal((seeds, 1))
        difference = of_seed + row_sd * random.standard_normal((1, ROWS))
        found = paired_difference(difference, np.full(ROWS, 8), RATE)
        widths.append(((found.high - found.low) / 3.92) ** 2)
    assert np.mean(widths) == pytest.approx(seed_sd**2 / seeds + row_sd**2 / ROWS, rel=0.25)


def test_no_difference_is_rarely_taken_for_one() -> None:
    random = np.random.default_rng(2)
    noise = [0.05 * random.standard_normal((8, 1)) + 0.5 * random.standard_normal((8, ROWS)) for _ in range(60)]
    found = [paired_difference(one, np.full(ROWS, 8), RATE) for one in noise]
    outside = sum(not one.low <= 0.0 <= one.high for one in found)
    assert outside <= 9, "about 3 of 60 are due, somewhat more with 8 seeds"
    assert sum(one.p_value < 0.05 for one in found) == outside, "interval and p-value agree"


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def test_tokens_to_reach() -> None:
    assert tokens_to_reach([10, 100, 1000], [5.0, 3.0, 2.0], 4.0) == pytest.approx(math.sqrt(1000))
    assert tokens_to_reach([10, 100], [5.0, 3.0], 3.0) == pytest.approx(100)
    assert tokens_to_reach([10, 100], [5.0, 3.0], 6.0) == 10.0, "at its first point already"
    assert tokens_to_reach([10, 100], [5.0, 3.0], 2.9) == math.inf

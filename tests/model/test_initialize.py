"""Initial weights: standard normal numbers that depend on (seed, name, element) and on nothing else."""

from __future__ import annotations

import math

import numpy as np

from megatron_md.model.initialize import normal_rows


def test_any_slice_of_rows_is_a_slice_of_the_whole() -> None:
    whole = normal_rows(1, "a.weight", 0, 50, 7)
    np.testing.assert_array_equal(normal_rows(1, "a.weight", 13, 9, 7), whole[13:22])


def test_seed_and_name_matter() -> None:
    first = normal_rows(1, "a.weight", 0, 4, 8)
    assert not np.any(first == normal_rows(2, "a.weight", 0, 4, 8))
    assert not np.any(first == normal_rows(1, "b.weight", 0, 4, 8))


def test_numbers_are_standard_normal() -> None:
    values = np.sort(normal_rows(3, "c.weight", 0, 1000, 100).ravel())
    # Kolmogorov-Smirnov: sup|F_n - F| exceeds 2.2/sqrt(n) with probability 1e-4 for a right sampler.
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in values[::10]])
    empirical = (np.arange(len(values)) + 0.5)[::10] / len(values)
    assert np.max(np.abs(cdf - empirical)) < 2.2 / math.sqrt(len(values))
    assert abs(np.corrcoef(values.reshape(-1)[::2], values[::2])[0, 1] - 1.0) < 1e-12


def test_neighbours_are_uncorrelated() -> None:
    table = normal_rows(4, "d.weight", 0, 2000, 64)
    for left, right in ((table[:, :-1], table[:, 1:]), (table[:-1], table[1:])):
        correlation = float(np.mean(left * right))
        assert abs(correlation) < 5.0 / math.sqrt(left.size)

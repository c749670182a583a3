"""Is one arm better than another? Paired differences over seeds and validation rows, with bootstrap intervals.

All arms are validated on the same rows with the same masks, and runs of one seed see the same data in the same order:
what pairs have in common drops out of d_sr, the difference of seed s on row r. The estimate is their mean, rows by
their tokens. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_md.batch import Int64Array
from megatron_md.diffusion.corruption import FloatArray

DRAWS = 10_000
_GROUP = 16  # neighbours by mask rate that are exchanged for each other
_CHUNK = 500  # draws at a time, for the memory's sake


@dataclass(frozen=True)
class Difference:
    """NELBO of one arm less that of another.

    Attributes:
        mean: nats per token; negative where the first is better.
        low: lower end of the 95 % interval.
        high: upper end.
        p_value: two-sided: how often a bootstrap mean lies beyond 0, twice.
        seeds: pairs of runs.
    """

    mean: float
    low: float
    high: float
    p_value: float
    seeds: int


def paired_difference(difference_SR: FloatArray, tokens_R: Int64Array, rate_R: FloatArray) -> Difference:
    """Mean of paired differences with a percentile interval from a bootstrap over seeds and rows at once.

    Seeds and rows are drawn anew independently of each other (the pigeonhole bootstrap; Owen 2007), rows among
    neighbours by mask rate only, as validation stratifies the rate over them. A resample of S things has (S - 1) / S of
    their variance, which is made good for both. With a single seed the interval holds for that seed alone.

    Args:
        difference_SR: nats per token, first arm less second.
        tokens_R: scored tokens of each row.
        rate_R: the mask rate at which each row was scored.
    """
    seeds = len(difference_SR)
    scored = np.flatnonzero(tokens_R > 0)
    order = scored[np.argsort(rate_R[scored], kind="stable")]
    tokens, nats_RS = tokens_R[order].astype(np.float64), (difference_SR[:, order] * tokens_R[order]).T
    mean_S = nats_RS.sum(axis=0) / tokens.sum()
    random = np.random.default_rng(0)
    groups = np.array_split(np.arange(len(order)), max(1, len(order) // _GROUP))
    spread = math.sqrt(len(order) / max(len(order) - len(groups), 1))
    draws = []
    for _ in range(DRAWS // _CHUNK):
        count_XR = np.concatenate(
            [random.multinomial(len(group), np.full(len(group), 1.0 / len(group)), _CHUNK) for group in groups], axis=1
        )
        drawn_XS = (count_XR @ nats_RS) / (count_XR @ tokens)[:, None]
        drawn_XS = mean_S + spread * (drawn_XS - mean_S)
        of_seeds_X = _resampled_deviation(drawn_XS, random)
        draws.append(drawn_XS.mean(axis=1) + of_seeds_X)
    draw_X = np.concatenate(draws)
    low, high = np.quantile(draw_X, [0.025, 0.975])
    beyond = min(int(np.sum(draw_X <= 0.0)), int(np.sum(draw_X >= 0.0)))
    return Difference(float(mean_S.mean()), float(low), float(high), min(1.0, 2 * (beyond + 1) / (DRAWS + 1)), seeds)


def _resampled_deviation(value_XS: FloatArray, random: np.random.Generator) -> FloatArray:
    """Mean over S values drawn anew less the mean over all, widened to the variance of a mean of S."""
    draws, seeds = value_XS.shape
    if seeds == 1:
        return np.zeros(draws)
    drawn_XS = np.take_along_axis(value_XS, random.integers(0, seeds, (draws, seeds)), axis=1)
    return np.asarray(math.sqrt(seeds / (seeds - 1)) * (drawn_XS.mean(axis=1) - value_XS.mean(axis=1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests: below a level, that test is rejected with the whole family's error at it.

    Holm (1979): the k-th smallest of m times m - k + 1, never below the one before it.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def tokens_to_reach(tokens: Sequence[float], nelbo: Sequence[float], target: float) -> float:
    """Tokens at which a curve first comes down to a value, linear in log tokens between its points; inf if never."""
    for number, value in enumerate(nelbo):
        if value <= target:
            if number == 0:
                return float(tokens[0])
            before = nelbo[number - 1]
            share = (before - target) / (before - value)
            return float(tokens[number - 1] * (tokens[number] / tokens[number - 1]) ** share)
    return math.inf

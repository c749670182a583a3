"""How sure a NELBO is: standard errors from one or more passes over the same rows, and the curve CE(t).

A pass p gives row i the value v_ip (estimators.py); the estimate is sum_i n_i mean_p(v_ip) / N with N = sum_i n_i. It
errs through its masks, which more passes cure, and through the choice of rows, which they do not. Functions of numpy
arrays [P passes, R rows]; z_ip = n_i (v_ip - estimate) / N. numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_md.batch import Int64Array
from megatron_md.diffusion.corruption import FloatArray

_STRATUM_BINS = 24
_DRAWS_PER_BIN = 8
_BACKFITTING_ROUNDS = 10


@dataclass(frozen=True)
class CurvePoint:
    """Cross-entropy at about one mask rate.

    Attributes:
        rate: mean mask rate of the draws in the bin.
        ce: their mean cross-entropy per masked token, in nats.
        stderr: its standard error over rows; nan with a single row.
        rows: different rows in the bin.
    """

    rate: float
    ce: float
    stderr: float
    rows: int


def weighted_mean(values_PR: FloatArray, maskable_R: Int64Array) -> float:
    """The estimate: rows enter by their tokens."""
    return float(np.sum(maskable_R * values_PR.mean(axis=0)) / maskable_R.sum())


def mask_stderr(values_PR: FloatArray, strata_PR: FloatArray | None, maskable_R: Int64Array) -> float:
    """Standard error from the masks alone, these rows given; nan for a single pass.

    se^2 = sum_i s_i^2 / P with s_i^2 the variance of row i's z_ip over passes, after the mean of each bin of the
    stratum is taken off: what hangs on the rate alone, stratification removes.

    Args:
        values_PR: values of all rows.
        strata_PR: the uniform behind each rate, if stratified over the rows of a pass; else None.
        maskable_R: n of each row.
    """
    passes, rows = values_PR.shape
    if passes < 2:
        return math.nan
    residual_PR, lost = _shares(values_PR, maskable_R), 0
    if strata_PR is not None:
        # Never finer than the strata themselves.
        bins = max(1, min(_STRATUM_BINS, rows, values_PR.size // _DRAWS_PER_BIN))
        bin_PR = np.minimum((strata_PR * bins).astype(np.int64), bins - 1)
        lost = bins - 1
        residual_PR = _without_bin_means(residual_PR, bin_PR, bins)
    free = max(values_PR.size - rows - lost, 1) / max(values_PR.size - rows, 1)
    return math.sqrt(float(residual_PR.var(axis=0, ddof=1).sum()) / free / passes)


def _without_bin_means(z_PR: FloatArray, bin_PR: Int64Array, bins: int) -> FloatArray:
    """Values less their bin's effect, where rows have effects too: least squares by backfitting."""
    count_K = np.maximum(np.bincount(bin_PR.ravel(), minlength=bins), 1)
    effect_PR = np.zeros_like(z_PR)
    for _ in range(_BACKFITTING_ROUNDS):
        rest_PR = z_PR - effect_PR
        within_PR = z_PR - rest_PR.mean(axis=0)
        effect_PR = (np.bincount(bin_PR.ravel(), within_PR.ravel(), minlength=bins) / count_K)[bin_PR]
    return np.asarray(z_PR - effect_PR)


def _shares(values_PR: FloatArray, maskable_R: Int64Array) -> FloatArray:
    """The z_ip, which add up to 0."""
    mean = weighted_mean(values_PR, maskable_R)
    return np.asarray(maskable_R * (values_PR - mean) / maskable_R.sum())


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


def total_stderr(values_PR: FloatArray, strata_PR: FloatArray | None, maskable_R: Int64Array) -> float:
    """Standard error from rows and masks together; nan for a single row.

    One pass has the paired-strata error: rows sorted by stratum, se^2 = sum over neighbours of (z_a - z_b)^2 (without
    strata the usual formula). The mean of P passes keeps the rows' part of that and 1/P of the masks' part.
    """
    is_scored_R = maskable_R > 0
    residual_PR = _shares(values_PR, maskable_R)
    squares = []
    for number, residual_R in enumerate(residual_PR):
        if strata_PR is None:
            squares.append(grouped_stderr(residual_R[is_scored_R], int(is_scored_R.sum())) ** 2)
        else:
            order = np.argsort(strata_PR[number], kind="stable")
            squares.append(grouped_stderr(residual_R[order][is_scored_R[order]], 2) ** 2)
    one_pass, passes = float(np.mean(squares)), len(values_PR)
    if passes == 1 or math.isnan(one_pass):
        return math.sqrt(one_pass)
    masks = mask_stderr(values_PR, strata_PR, maskable_R) ** 2
    return math.sqrt(max(one_pass - (passes - 1) * masks, masks))


def curve(ce_PDR: FloatArray, rate_PDR: FloatArray, maskable_R: Int64Array, bins: int = 20) -> list[CurvePoint]:
    """Cross-entropy by mask rate: token-weighted means of the draws whose rate is in ((k-1)/K, k/K]; empty bins go.

    Args:
        ce_PDR: summed cross-entropy / (n rate) of each draw.
        rate_PDR: its rate; 0 where there is none.
        maskable_R: n of each row.
        bins: K.
    """
    bin_PDR = np.clip(np.ceil(rate_PDR * bins - 1e-9).astype(np.int64) - 1, 0, bins - 1)
    points = []
    for k in range(bins):
        is_in_PDR = (bin_PDR == k) & (rate_PDR > 0.0)
        tokens_R = is_in_PDR.sum(axis=(0, 1)) * maskable_R
        total = int(tokens_R.sum())
        if total == 0:
            continue
        ce = float(np.sum(is_in_PDR * maskable_R * ce_PDR) / total)
        # Draws of one row hang together, so each row's sum is one observation.
        residual_R = np.sum(is_in_PDR * maskable_R * (ce_PDR - ce), axis=(0, 1)) / total
        rows = int(np.count_nonzero(tokens_R))
        stderr = math.sqrt(rows / (rows - 1) * float(np.sum(residual_R**2))) if rows > 1 else math.nan
        rate = float(np.sum(is_in_PDR * maskable_R * rate_PDR) / total)
        points.append(CurvePoint(rate, ce, stderr, rows))
    return points

"""The regularised incomplete beta function I_x(a, b) and its inverse in x, vectorised, without scipy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_TINY = 1e-300


def log_beta(a: float, b: float) -> float:
    """Logarithm of the beta function B(a, b)."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _continued_fraction(x: FloatArray, a: float, b: float) -> FloatArray:
    """The fraction 1/(1 + d_1/(1 + d_2/(1 + ...))) of DLMF 8.17.22 by Lentz's method; for x <= (a+1)/(a+b+2)."""
    c = np.ones_like(x)
    d = 1.0 / _away_from_zero(1.0 - (a + b) / (a + 1.0) * x)
    value = d.copy()
    for m in range(1, 10_000):
        even = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m)) * x
        odd = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1)) * x
        for term in (even, odd):
            d = 1.0 / _away_from_zero(1.0 + term * d)
            c = _away_from_zero(1.0 + term / c)
            step = c * d
            value *= step
        if np.all(np.abs(step - 1.0) < 1e-15):
            break
    return value


def _away_from_zero(x: FloatArray) -> FloatArray:
    return np.where(np.abs(x) < _TINY, _TINY, x)


def _by_fraction(x: FloatArray, a: float, b: float) -> FloatArray:
    """I_x(a, b) = x^a (1-x)^b / (a B(a, b)) * fraction (DLMF 8.17.22), where the fraction converges fast."""
    with np.errstate(divide="ignore"):
        log_front = a * np.log(x) + b * np.log1p(-x) - log_beta(a, b) - math.log(a)
    return np.exp(log_front) * _continued_fraction(x, a, b)


def incomplete_beta(x: FloatArray, a: float, b: float) -> FloatArray:
    """I_x(a, b): the CDF of the beta distribution.

    Args:
        x: points in [0, 1].
        a: first shape, > 0.
        b: second shape, > 0.
    """
    x = np.clip(np.asarray(x, dtype=np.float64), 0.0, 1.0)
    value = np.empty_like(x)
    # The fraction converges fast below the mean; above it I_x(a, b) = 1 - I_{1-x}(b, a).
    is_low = x <= (a + 1.0) / (a + b + 2.0)
    value[is_low] = _by_fraction(x[is_low], a, b)
    value[~is_low] = 1.0 - _by_fraction(1.0 - x[~is_low], b, a)
    return np.clip(value, 0.0, 1.0)


def beta_density(x: FloatArray, a: float, b: float) -> FloatArray:
    """x^(a-1) (1-x)^(b-1) / B(a, b) on [0, 1], 0 outside; infinite at an end where it diverges."""
    x = np.asarray(x, dtype=np.float64)
    inside = np.clip(x, 0.0, 1.0)
    with np.errstate(divide="ignore"):
        value = inside ** (a - 1.0) * (1.0 - inside) ** (b - 1.0) * math.exp(-log_beta(a, b))
    return np.where((x >= 0.0) & (x <= 1.0), value, 0.0)


def inverse_incomplete_beta(u: FloatArray, a: float, b: float, nodes: FloatArray, values: FloatArray) -> FloatArray:
    """The x with I_x(a, b) = u, by Newton's method kept inside a bracket (bisection where Newton leaves it).

    Args:
        u: probabilities in [0, 1].
        a: first shape.
        b: second shape.
        nodes: increasing points from 0 to 1, for the first bracket.
        values: `incomplete_beta(nodes, a, b)`.
    """
    u = np.asarray(u, dtype=np.float64)
    right = np.clip(np.searchsorted(values, u, side="left"), 1, len(nodes) - 1)
    low, high = nodes[right - 1].copy(), nodes[right].copy()
    x = np.clip(np.interp(u, values, nodes), low, high)
    for _ in range(80):
        error = incomplete_beta(x, a, b) - u
        low, high = np.where(error < 0.0, x, low), np.where(error > 0.0, x, high)
        with np.errstate(divide="ignore", invalid="ignore"):
            newton = x - error / beta_density(x, a, b)
        is_inside = (newton > low) & (newton < high)
        following = np.where(error == 0.0, x, np.where(is_inside, newton, 0.5 * (low + high)))
        if np.all(np.abs(following - x) <= 4e-16 * x):
            return following
        x = following
    return x

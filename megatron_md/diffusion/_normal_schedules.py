"""Mask schedules that are bells: a normal distribution cut to [0, 1], and one of the log-odds of t."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

from megatron_md.diffusion._schedule_base import FloatArray, MaskSchedule, register_schedule
from megatron_md.errors import UserError

_LEAST, _MOST = math.ulp(0.0), math.nextafter(1.0, 0.0)  # where the quantile is finite
_MIDPOINTS = (np.arange(1 << 15) + 0.5) / (1 << 15)

# P(Z <= z), exact in the lower tail, which `NormalDist.cdf` loses; and its inverse.
_cumulative = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2.0)), otypes=[np.float64])
_quantile = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])


def _density(z: FloatArray) -> FloatArray:
    return np.asarray(np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi))


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{name} must lie in [{low:g}, {high:g}], got {value:g}")


class _Bell(MaskSchedule):
    """Quantiles take a call of Python each: expectations, which every step may ask for, share one grid of them."""

    @cached_property
    def _grid(self) -> FloatArray:
        return self.inverse_cdf(_MIDPOINTS)

    def expectation(self, function: Callable[[FloatArray], FloatArray], progress: float = 0.0) -> float:
        """E[function(t)], by the midpoint rule in u = F(t)."""
        return float(np.mean(function(self._grid)))


@register_schedule("truncated_normal")
@dataclass(frozen=True)
class TruncatedNormal(_Bell):
    """t normal about `mode` with standard deviation `std`, given that it lies in [0, 1]."""

    mode: float
    std: float

    def __post_init__(self) -> None:
        _check("mode", self.mode, 0.0, 1.0)
        _check("std", self.std, 1e-3, 1e3)

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """Phi at t = 0 and at t = 1."""
        low, high = _cumulative(self._z(np.array([0.0, 1.0])))
        return float(low), float(high)

    def _z(self, t: FloatArray) -> FloatArray:
        return np.asarray((np.asarray(t, dtype=np.float64) - self.mode) / self.std)

    def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Equal to phi(z) / (std (Phi(z_1) - Phi(z_0))) at z = (t - mode) / std."""
        low, high = self._ends
        return np.asarray(_density(self._z(t)) / (self.std * (high - low)))

    def cdf(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Equal to (Phi(z) - Phi(z_0)) / (Phi(z_1) - Phi(z_0))."""
        low, high = self._ends
        return np.asarray(np.clip((_cumulative(self._z(np.clip(t, 0.0, 1.0))) - low) / (high - low), 0.0, 1.0))

    def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
        """The quantile of the normal distribution at Phi(z_0) + u (Phi(z_1) - Phi(z_0))."""
        low, high = self._ends
        z = _quantile(np.clip(low + (high - low) * np.asarray(u, dtype=np.float64), _LEAST, _MOST))
        return np.asarray(np.clip(self.mode + self.std * z, 0.0, 1.0))

    def __str__(self) -> str:
        return f"truncated_normal:{self.mode:g},{self.std:g}"


@register_schedule("logit_normal")
@dataclass(frozen=True)
class LogitNormal(_Bell):
    """t whose log-odds log(t / (1 - t)) are normal with mean `location` and standard deviation `scale`."""

    location: float
    scale: float

    def __post_init__(self) -> None:
        _check("location", self.location, -20.0, 20.0)
        _check("scale", self.scale, 1e-3, 10.0)

    def _z(self, t: FloatArray) -> FloatArray:
        """Of the log-odds; infinite at 0 and 1."""
        t = np.clip(np.asarray(t, dtype=np.float64), 0.0, 1.0)
        with np.errstate(divide="ignore"):
            return np.asarray((np.log(t) - np.log1p(-t) - self.location) / self.scale)

    def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Equal to phi(z) / (scale t (1 - t)); 0 at 0 and 1."""
        t = np.asarray(t, dtype=np.float64)
        spread = self.scale * t * (1.0 - t)
        return np.asarray(np.divide(_density(self._z(t)), spread, out=np.zeros_like(t), where=spread > 0.0))

    def cdf(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Equal to Phi(z)."""
        return np.asarray(_cumulative(self._z(t)))

    def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
        """The sigmoid of the quantile of the log-odds."""
        odds = np.exp(-(self.location + self.scale * _quantile(np.clip(u, _LEAST, _MOST))))
        return np.asarray(1.0 / (1.0 + odds))

    def __str__(self) -> str:
        return f"logit_normal:{self.location:g},{self.scale:g}"

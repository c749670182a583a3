"""A mask schedule from gradient statistics of a pilot: which rates carry signal, which only noise.

[0, 1] is cut into A bins of the mask rate. Let g_a be the gradient of one row's loss (weight 1/t) at a rate of bin a,
in coordinates where the optimizer's preconditioner is the identity, G_a its mean, G = mean_a G_a the gradient of the
full-range NELBO, and

    s_a = <G, G_a>      signal: what a step along G_a does for the NELBO
    v_a = E |g_a|^2     second moment: signal and noise of one row

A step along a mean of gradients with noise v lowers a quadratic by an amount proportional to signal^2 / noise, so that

    gain of density p  = (sum p_a s_a)^2 / (sum p_a v_a), over the same of U[0, 1]

says how many rows of U[0, 1] a row of p is worth, as long as noise dominates. A window within bin a has s_a^2 / v_a.

    aligned    p_a ~ max(s_a, 0) / sqrt(v_a): weights omega_a ~ max(s_a, 0) / v_a, sampled in proportion to
               omega_a sqrt(v_a), which keeps the noise of omega's gradient least
    variance   p_a ~ sqrt(v_a), for `importance`: the least second moment of an unbiased gradient of the NELBO (as
               P-POTS, arXiv 2511.18159); gain (mean_a v_a) / mean_a (v_a / (A p_a))

Both get a floor, a share of U[0, 1]. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_md.diffusion._schedule_base import FloatArray

BINS = 16
FLOOR = 0.1
LEAST_GROUPS = 8  # halves of which one is left out still make pairs


@dataclass(frozen=True)
class Moments:
    """Signal and second moment by bin of the mask rate.

    Attributes:
        signal_A: s, estimated from pairs of gradients of different rows.
        moment_A: v of one row.
    """

    signal_A: FloatArray
    moment_A: FloatArray


@dataclass(frozen=True)
class GradientProducts:
    """Inner products of all pairs of the gradients of K groups of rows, each at every bin's rates.

    Attributes:
        products_AKAK: of group k at bin a with group l at bin b.
        rows: rows of a group.
    """

    products_AKAK: FloatArray
    rows: int

    @classmethod
    def of(cls, gradients_AKD: npt.NDArray[np.floating], rows: int) -> GradientProducts:
        """From the mean gradient of each group at each bin, or a sketch of it that keeps inner products."""
        bins, groups, _ = gradients_AKD.shape
        assert groups >= LEAST_GROUPS, "the command checks the number of rows"
        flat = gradients_AKD.reshape(bins * groups, -1).astype(np.float64)
        return cls((flat @ flat.T).reshape(bins, groups, bins, groups), rows)

    def of_groups(self, index: npt.NDArray[np.intp]) -> GradientProducts:
        """Those of some of the groups."""
        return replace(self, products_AKAK=self.products_AKAK[:, index][:, :, :, index])

    def moments(self) -> Moments:
        """Unbiased: no product of a group with itself counts as signal."""
        groups = self.products_AKAK.shape[1]
        same_AA = np.einsum("akbk->ab", self.products_AKAK)
        across_AA = (self.products_AKAK.sum(axis=(1, 3)) - same_AA) / (groups * (groups - 1))
        squared_A, group_moment_A = np.diag(across_AA), np.diag(same_AA) / groups
        return Moments(across_AA.mean(axis=1), squared_A + self.rows * (group_moment_A - squared_A))

    def jackknife(self, figure: Callable[[GradientProducts], FloatArray | float]) -> FloatArray:
        """Standard error of a figure, by leaving out each group in turn."""
        everyone = np.arange(self.products_AKAK.shape[1])
        values = np.array([figure(self.of_groups(np.delete(everyone, k))) for k in everyone])
        return np.asarray(np.sqrt((len(everyone) - 1) * values.var(axis=0)))

    def held_out_gain(
        self, density: Callable[[Moments], FloatArray], gain: Callable[[Moments, FloatArray], float]
    ) -> float:
        """Gain of a density that is fitted to half of the groups, measured on the other half; mean of both ways."""
        everyone = np.arange(self.products_AKAK.shape[1])
        one, other = (self.of_groups(half).moments() for half in np.array_split(everyone, 2))
        return 0.5 * (gain(other, density(one)) + gain(one, density(other)))


def aligned_density(moments: Moments) -> FloatArray:
    """Chance of each bin, in proportion to max(s, 0) / sqrt(v), with the floor; uniform where there is no signal."""
    return _floored(np.maximum(moments.signal_A, 0.0) / np.sqrt(_positive(moments.moment_A)))


def variance_density(moments: Moments) -> FloatArray:
    """Chance of each bin, in proportion to sqrt(v), with the floor."""
    return _floored(np.sqrt(_positive(moments.moment_A)))


def aligned_gain(moments: Moments, chance_A: FloatArray) -> float:
    """Rows of U[0, 1] that a row of this density is worth, with weight `elbo`."""
    uniform = moments.signal_A.mean() ** 2 / moments.moment_A.mean()
    return float((chance_A @ moments.signal_A) ** 2 / (chance_A @ moments.moment_A) / uniform)


def variance_gain(moments: Moments, chance_A: FloatArray) -> float:
    """The same with `importance`, which leaves the signal as it is."""
    return float(moments.moment_A.mean() / np.sum(moments.moment_A / chance_A / len(chance_A) ** 2))


def window_gains(moments: Moments) -> FloatArray:
    """`aligned_gain` of each bin alone, with the sign of its signal."""
    uniform = moments.signal_A.mean() ** 2 / moments.moment_A.mean()
    return np.asarray(np.sign(moments.signal_A) * moments.signal_A**2 / _positive(moments.moment_A) / uniform)


def knots(chance_A: FloatArray) -> list[tuple[float, float]]:
    """(t, density) points through the middles of the bins, flat beyond the outer ones."""
    bins = len(chance_A)
    density_A = chance_A * bins
    middles = (np.arange(bins) + 0.5) / bins
    inner = zip(middles.tolist(), density_A.tolist(), strict=True)
    return [(0.0, float(density_A[0])), *inner, (1.0, float(density_A[-1]))]


def _floored(raw_A: FloatArray) -> FloatArray:
    uniform_A = np.full(len(raw_A), 1.0 / len(raw_A))
    total = raw_A.sum()
    return np.asarray((1.0 - FLOOR) * raw_A / total + FLOOR * uniform_A) if total > 0.0 else uniform_A


def _positive(moment_A: FloatArray) -> FloatArray:
    """Estimates that came out at 0 or below (a bin without gradient) as the least positive one."""
    positive = moment_A[moment_A > 0.0]
    return np.maximum(moment_A, positive.min() if len(positive) else 1.0)

"""How much a row's cross-entropy counts, and what the sum is divided by: all of it known on the host.

Let a row have n maskable tokens, a mask rate t drawn from the schedule p and floored, s = max(t, floor), and m masked
ones. The loss of a global batch is `sum_rows w * (sum of CE over the row's m masked tokens) / sum_rows d`, d an
integer, so that it needs no knowledge of the model. Write q = p, or q = U[0, 1] under `importance` (whose factor 1/p(t)
turns E_p into E_q).

    weight      raw weight r     E[m r / importance factor]        in the denominator
    elbo        1 / s            n                                 every row
    none        1                n E_q[s]                          every row
    realised    n / m            n C_q,  C_q = P_q(m > 0)          rows with m > 0

    normalise   d                E[d]   (C = C_p under `realised`, else 1)
    maskable    n                n C
    masked      m                n E_p[s]
    sequences   1                C

The weight is r (or r / p(t)) times `E[d] / E[m r]`. A model with CE = log V everywhere then has E[numerator] =
log V * E[denominator]: the training loss of a uniform model is log V for every choice. For `maskable` this is
E[t w] = 1. C_q = 1 - E_q[(1 - s)^n].
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from megatron_md.batch import Int64Array
from megatron_md.diffusion.schedule import FloatArray, MaskSchedule
from megatron_md.errors import UserError
from megatron_md.messages import nearest

WeightName = Literal["elbo", "none", "realised"]
Normalise = Literal["maskable", "masked", "sequences"]


class Weighting:
    """Row weights and denominator; the equations are at the top of this file."""

    def __init__(
        self,
        schedule: MaskSchedule,
        *,
        weight: WeightName = "elbo",
        importance: bool = False,
        normalise: Normalise = "maskable",
        min_mask_rate: float = 1e-3,
    ) -> None:
        """Check the choices.

        Args:
            schedule: distribution p of the mask rate.
            weight: `elbo` (1/t), `none`, or `realised` (maskable / masked of the row).
            importance: divide by p(t), which estimates the full-range NELBO without bias.
            normalise: the global count that the sum is divided by.
            min_mask_rate: floor of t.

        Raises:
            UserError: an unknown name, a floor outside (0, 1), or `importance` with a density that is not positive.
        """
        _check_choice("weight", weight, get_args(WeightName))
        _check_choice("normalise", normalise, get_args(Normalise))
        if not 0.0 < min_mask_rate < 1.0:
            raise UserError(f"objective.min_mask_rate must lie strictly between 0 and 1, got {min_mask_rate:g}")
        if importance and not schedule.has_full_support():
            raise UserError(
                f"objective.importance needs a mask schedule with positive density on all of [0, 1], and {schedule} "
                "is not one: add a uniform floor with a mixture, or set importance: false"
            )
        self.schedule = schedule
        self.weight: WeightName = weight
        self.importance = importance
        self.normalise: Normalise = normalise
        self.min_mask_rate = min_mask_rate
        self._scale = lru_cache(maxsize=4096)(self._expected_count_over_sum)

    def row_weights(
        self, mask_rate_B: FloatArray, masked_B: Int64Array, maskable_B: Int64Array, progress: float
    ) -> FloatArray:
        """Weight w of each row's cross-entropy: float64 [B].

        Args:
            mask_rate_B: t as drawn, before the floor.
            masked_B: masked tokens m of each row.
            maskable_B: maskable tokens n of each row.
            progress: share of the run done.
        """
        n_B, m_B = np.maximum(maskable_B, 1).astype(np.float64), np.maximum(masked_B, 1).astype(np.float64)
        if self.weight == "elbo":
            weights_B = 1.0 / self.floored(mask_rate_B)
        elif self.weight == "none":
            weights_B = np.ones_like(n_B)
        else:
            weights_B = n_B / m_B
        if self.importance:
            weights_B = weights_B / self.schedule.density(mask_rate_B, progress)
        lengths, index_B = np.unique(n_B, return_inverse=True)
        scales = np.array([self._scale(int(n), progress) for n in lengths])
        return np.asarray(weights_B * scales[index_B], dtype=np.float64)

    def denominator(self, masked_B: Int64Array, maskable_B: Int64Array) -> int:
        """The rows' share of the global count."""
        if self.normalise == "masked":
            return int(masked_B.sum())
        is_counted_B = masked_B > 0 if self.weight == "realised" else maskable_B > 0
        return int(maskable_B[is_counted_B].sum()) if self.normalise == "maskable" else int(is_counted_B.sum())

    def floored(self, mask_rate_B: FloatArray) -> FloatArray:
        """The rate that positions are masked with: s = max(t, floor)."""
        return np.maximum(mask_rate_B, self.min_mask_rate)

    def _expected_count_over_sum(self, n: int, progress: float) -> float:
        """E[d] / E[m r] of a row with n maskable tokens."""
        if self.weight == "none" and self.normalise == "masked" and not self.importance:
            return 1.0  # n E_p[s] on both sides
        counted = covered = 1.0
        # Otherwise C_p stands on both sides and cancels; it is the only costly term.
        if self.weight == "realised" and (self.importance or self.normalise == "masked"):
            counted, covered = (
                self._coverage(n, progress, importance=False),
                self._coverage(n, progress, self.importance),
            )
        expected_sum = n * covered
        if self.weight == "none":
            expected_sum = n * self._mean_rate(progress, self.importance)
        if self.normalise == "masked":
            return n * self._mean_rate(progress, importance=False) / expected_sum
        return (n * counted if self.normalise == "maskable" else counted) / expected_sum

    def _mean_rate(self, progress: float, importance: bool) -> float:
        """E_q[s] = E_q[t] + E_q[max(floor - t, 0)]."""
        floor = self.min_mask_rate
        if importance:
            return 0.5 + 0.5 * floor**2
        below = self.schedule.expectation(lambda t: np.maximum(floor - t, 0.0), progress)
        return self.schedule.mean(progress) + below

    def _coverage(self, n: int, progress: float, importance: bool) -> float:
        """C_q = P_q(m > 0) = 1 - E_q[(1 - s)^n]."""
        floor = self.min_mask_rate
        if importance:
            return float(1.0 - floor * (1.0 - floor) ** n - (1.0 - floor) ** (n + 1) / (n + 1))
        return 1.0 - self.schedule.expectation(lambda t: (1.0 - self.floored(t)) ** n, progress)


def _check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"objective.{key}: unknown {value!r}{nearest(value, known)} (known: {', '.join(known)})")

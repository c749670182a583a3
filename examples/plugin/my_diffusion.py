"""A third party's mask schedule and objective: importing this module registers both.

Names for the config: `mask_schedule: "cosine:0"` and `name: context_adaptive`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_md.batch import BoolArray, CleanBatch, CorruptedBatch
from megatron_md.diffusion.objective import (
    MEAN_METRICS,
    Metrics,
    ObjectiveContext,
    build_objective,
    register_objective,
)
from megatron_md.diffusion.schedule import FloatArray, MaskSchedule, register_schedule


@register_schedule("cosine")
@dataclass(frozen=True)
class Cosine(MaskSchedule):
    """t = lo + (1 - lo) sin(pi u / 2) with u uniform: mostly high rates (the cosine schedule of MaskGIT).

    `density` and `inverse_cdf` are all that a schedule must give.
    """

    lo: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.lo < 1.0:
            raise ValueError(f"lo must lie in [0, 1), got {self.lo:g}")

    def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Derivative of u = (2 / pi) asin((t - lo) / (1 - lo)); infinite at t = 1."""
        x = (np.asarray(t, dtype=np.float64) - self.lo) / (1.0 - self.lo)
        with np.errstate(divide="ignore", invalid="ignore"):
            density = 2.0 / (np.pi * np.sqrt(1.0 - x * x) * (1.0 - self.lo))
        return np.where((x >= 0.0) & (x <= 1.0), density, 0.0)

    def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
        """The rate below which a share u of the draws lies."""
        return self.lo + (1.0 - self.lo) * np.sin(0.5 * np.pi * np.asarray(u, dtype=np.float64))

    def __str__(self) -> str:
        return f"cosine:{self.lo:g}"


@register_objective("context_adaptive")
class ContextAdaptive:
    """Masked diffusion in which tokens near visible context count more (the CART weights of Dream 7B).

    A masked position i weighs sum over visible j of p (1 - p)^(|i - j| - 1) / 2, whatever the mask rate.
    """

    name = "context_adaptive"
    causal = False
    metric_names = MEAN_METRICS

    def __init__(self, context: ObjectiveContext, *, sharpness: float = 0.1) -> None:
        """`context` comes from the trainer, `sharpness` (p) from the config's `objective.options`."""
        if not 0.0 < sharpness < 1.0:
            raise ValueError(f"objective.options.sharpness must lie in (0, 1), got {sharpness}")
        self.sharpness = sharpness
        self.base = build_objective(
            replace(context.config, name="masked_diffusion", options={}),
            seed=context.seed,
            mask_token_id=context.mask_token_id,
        )

    def corrupt(self, batch: CleanBatch) -> CorruptedBatch:
        """Masked diffusion's corruption, at other weights."""
        corrupted = self.base.corrupt(batch)
        is_masked_BL = np.zeros(batch.tokens_BL.shape, dtype=bool)
        is_masked_BL.reshape(-1)[corrupted.positions_M] = True
        weights_BL = context_weights(is_masked_BL, self.sharpness)
        return replace(corrupted, weights_M=weights_BL.reshape(-1)[corrupted.positions_M].astype(np.float32))

    def reduce(self, nll_M: torch.Tensor, corrupted: CorruptedBatch) -> Metrics:
        """The usual metrics."""
        return self.base.reduce(nll_M, corrupted)


def context_weights(is_masked_BL: BoolArray, sharpness: float) -> FloatArray:
    """Weights [B, L]: how much visible context surrounds each masked position; 0 at visible ones."""
    length = is_masked_BL.shape[1]
    distance_L = np.abs(np.arange(-length + 1, length))
    kernel = np.where(distance_L > 0, 0.5 * sharpness * (1.0 - sharpness) ** (distance_L - 1.0), 0.0)
    visible = [np.convolve(~row, kernel)[length - 1 : 2 * length - 1] for row in is_masked_BL]
    return np.where(is_masked_BL, np.stack(visible), 0.0)

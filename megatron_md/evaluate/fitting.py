"""The figures of `schedule fit` from gradients of one checkpoint or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from megatron_md.diffusion import fit
from megatron_md.diffusion.corruption import FloatArray
from megatron_md.diffusion.fit import BINS, GradientProducts
from megatron_md.evaluate.gradients import ByRate

DENSITIES = {
    "aligned": (fit.aligned_density, fit.aligned_gain),
    "variance": (fit.variance_density, fit.variance_gain),
}


def figures_of(found: Sequence[ByRate], group: int) -> dict[str, Any]:
    """Statistics, densities and their predicted gains, each the mean over the checkpoints, as JSON holds them.

    Args:
        found: by checkpoint.
        group: rows of a gradient.
    """
    products = [GradientProducts.of(one.gradients_AKD, group) for one in found]
    figures: dict[str, Any] = {
        "steps": [one.step for one in found],
        "edges": (np.arange(BINS + 1) / BINS).tolist(),
        "loss": _mean([one.loss_AR.mean(axis=1) for one in found]),
        "loss_std": _mean([one.loss_AR.std(axis=1) for one in found]),
        **_with_error("signal", products, lambda own: own.moments().signal_A),
        **_with_error("moment", products, lambda own: own.moments().moment_A),
        **_with_error("window_gain", products, lambda own: fit.window_gains(own.moments())),
    }
    densities: dict[str, Any] = {}
    for name, (density, gain) in DENSITIES.items():
        chance_A = np.mean([density(own.moments()) for own in products], axis=0)
        densities[name] = {
            "knots": fit.knots(chance_A),
            "bins": (chance_A * BINS).tolist(),
            **_with_error("gain", products, partial(GradientProducts.held_out_gain, density=density, gain=gain)),
        }
    return {**figures, "densities": densities}


def _with_error(
    name: str, products: Sequence[GradientProducts], figure: Callable[[GradientProducts], FloatArray | float]
) -> dict[str, Any]:
    """Mean over the checkpoints, and its standard error; theirs go together, as all of them see the same rows."""
    errors = [own.jackknife(figure) for own in products]
    return {name: _mean([figure(own) for own in products]), f"{name}_stderr": _mean(errors)}


def _mean(values: Sequence[FloatArray | float]) -> Any:
    return np.mean(np.array(values), axis=0).tolist()

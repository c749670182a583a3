"""The law of the mask rate over a run, for its picture."""

from __future__ import annotations

import numpy as np

from megatron_md.config import ResolvedConfig
from megatron_md.diffusion._schedule_base import FloatArray, MaskSchedule
from megatron_md.diffusion.pairs import law_of_rates

Densities = dict[str, FloatArray]

BINS = 200
_MOMENTS = {"start": 0.0, "middle": 0.5, "end": 1.0}


def described(config: ResolvedConfig | None) -> tuple[str, Densities | None]:
    """What a run's mask schedule is, and its density at the start, in the middle and at the end of the run.

    None where nothing is masked, where the schedule is not registered (the modules of `imports` are not imported) or
    its file not there, and without a config. A law that stays has one density.
    """
    if config is None:
        return "no config", None
    if config.objective.name == "autoregressive":
        return "none, autoregressive", None
    spec = config.objective.mask_schedule
    label = spec if isinstance(spec, str) else str(spec.get("name"))
    try:
        law = law_of_rates(config.objective)
        with np.errstate(all="ignore"):
            found = {name: _density(law, progress) for name, progress in _MOMENTS.items()}
    except (ValueError, ArithmeticError, OSError):
        return label, None
    start, *later = found.values()
    if all(np.array_equal(start, density) for density in later):
        found = {"whole run": start}
    return (label if label == str(law) else f"{label}, {law}"), found


def _density(law: MaskSchedule, progress: float) -> FloatArray:
    """Means over bins, from the CDF, so that a single rate has a height too."""
    cdf = np.array(law.cdf(np.linspace(0.0, 1.0, BINS + 1), progress), dtype=np.float64)
    cdf[0] = 0.0  # a rate of exactly 0 belongs to the first bin
    density = np.diff(cdf) * BINS
    if not np.isfinite(density).all():
        raise ArithmeticError("no density")
    return np.asarray(density)

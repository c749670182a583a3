"""Mask schedules: the distribution of the mask rate t in training, and how it changes over the run.

`uniform:lo,hi`, `beta:a,b`, `truncated_normal:mode,std`, `logit_normal:location,scale`, `point:t`, `knots` (a
piecewise-linear density, inline or from a file), `mixture`, and over the run `curriculum` (one schedule after another)
and `anneal` (one becomes another little by little). `parse_schedule` reads them from a config, also by the names of
`PRESETS`, and `register_schedule` adds a third party's. numpy only, so that a config can be checked without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_md.diffusion._composite_schedules import Anneal, Curriculum, Mixture, Staged
from megatron_md.diffusion._normal_schedules import LogitNormal, TruncatedNormal
from megatron_md.diffusion._schedule_base import (
    FloatArray,
    MaskSchedule,
    check_keys,
    number,
    parse_schedule,
    quote,
    register_schedule,
)
from megatron_md.diffusion.incomplete_beta import beta_density, incomplete_beta, inverse_incomplete_beta
from megatron_md.diffusion.schedule_presets import PRESETS
from megatron_md.errors import UserError
from megatron_md.json_file import parse_json, read_regular

__all__ = [
    "PRESETS",
    "Anneal",
    "Beta",
    "Curriculum",
    "FloatArray",
    "Knots",
    "LogitNormal",
    "MaskSchedule",
    "Mixture",
    "Point",
    "Staged",
    "TruncatedNormal",
    "Uniform",
    "parse_schedule",
    "register_schedule",
]


@register_schedule("uniform")
@dataclass(frozen=True)
class Uniform(MaskSchedule):
    """t uniform on the window [lo, hi]."""

    lo: float
    hi: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.lo <= 1.0 or not 0.0 <= self.hi <= 1.0:
            raise UserError(f"the window must lie in [0, 1], got [{self.lo:g}, {self.hi:g}]")
        if not self.lo < self.hi:
            raise UserError(f"lo must be below hi, got {self.lo:g} and {self.hi:g} (one fixed rate: point:{self.lo:g})")

    def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Equal to 1 / (hi - lo) inside the window."""
        return np.where((t >= self.lo) & (t <= self.hi), 1.0 / (self.hi - self.lo), 0.0)

    def cdf(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Equal to (t - lo) / (hi - lo), clipped to [0, 1]."""
        return np.clip((np.asarray(t, dtype=np.float64) - self.lo) / (self.hi - self.lo), 0.0, 1.0)

    def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
        """Equal to lo + (hi - lo) u."""
        return np.minimum(self.lo + (self.hi - self.lo) * np.asarray(u, dtype=np.float64), self.hi)

    def mean(self, progress: float = 0.0) -> float:
        """Equal to (lo + hi) / 2."""
        return 0.5 * (self.lo + self.hi)

    def __str__(self) -> str:
        return f"uniform:{self.lo:g},{self.hi:g}"


@register_schedule("beta")
@dataclass(frozen=True)
class Beta(MaskSchedule):
    """t with density proportional to t^(a-1) (1-t)^(b-1)."""

    a: float
    b: float

    def __post_init__(self) -> None:
        if not (0.0 < self.a < math.inf and 0.0 < self.b < math.inf):
            raise UserError(f"both shapes must be positive, got {self.a:g} and {self.b:g}")

    @cached_property
    def _table(self) -> tuple[FloatArray, FloatArray]:
        """Points of [0, 1], closest together at its ends, and the CDF there."""
        nodes = np.sin(0.5 * np.pi * np.linspace(0.0, 1.0, 4097)) ** 2
        return nodes, incomplete_beta(nodes, self.a, self.b)

    def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Equal to t^(a-1) (1-t)^(b-1) / B(a, b)."""
        return beta_density(t, self.a, self.b)

    def cdf(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """The regularised incomplete beta function I_t(a, b)."""
        return incomplete_beta(t, self.a, self.b)

    def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
        """The t with I_t(a, b) = u."""
        return inverse_incomplete_beta(u, self.a, self.b, *self._table)

    def expectation(self, function: Callable[[FloatArray], FloatArray], progress: float = 0.0) -> float:
        """E[function(t)] as a Stieltjes sum over the cells of the table."""
        nodes, values = self._table
        return float(np.sum(function(0.5 * (nodes[1:] + nodes[:-1])) * np.diff(values)))

    def mean(self, progress: float = 0.0) -> float:
        """Equal to a / (a + b)."""
        return self.a / (self.a + self.b)

    def __str__(self) -> str:
        return f"beta:{self.a:g},{self.b:g}"


@register_schedule("point")
@dataclass(frozen=True)
class Point(MaskSchedule):
    """Always the same t: an atom."""

    t: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.t <= 1.0:
            raise UserError(f"the mask rate must lie in [0, 1], got {self.t:g}")

    def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Infinite at the point."""
        return np.where(np.asarray(t, dtype=np.float64) == self.t, np.inf, 0.0)

    def cdf(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """A step from 0 to 1."""
        return np.where(np.asarray(t, dtype=np.float64) >= self.t, 1.0, 0.0)

    def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
        """The point for every u."""
        return np.full(np.shape(u), self.t, dtype=np.float64)

    def expectation(self, function: Callable[[FloatArray], FloatArray], progress: float = 0.0) -> float:
        """The function at the point."""
        return float(function(np.array([self.t]))[0])

    def __str__(self) -> str:
        return f"point:{self.t:g}"


@register_schedule("knots")
@dataclass(frozen=True)
class Knots(MaskSchedule):
    """Piecewise-linear density through (t, density) points, normalised; 0 outside them.

    Attributes:
        points: at least two, t strictly increasing in [0, 1].
        file: where the points came from, if from a file.
    """

    points: tuple[tuple[float, float], ...]
    file: str | None = None

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise UserError(f"needs at least two points [t, density], got {len(self.points)}")
        t, density = self._t, np.array([point[1] for point in self.points])
        if np.any(np.diff(t) <= 0.0):
            raise UserError("the t of its points must increase strictly")
        if t[0] < 0.0 or t[-1] > 1.0:
            raise UserError(f"its points must lie in [0, 1], got t from {t[0]:g} to {t[-1]:g}")
        if np.any(density < 0.0):
            raise UserError(f"a density must not be negative, got {density.min():g}")
        if not np.any(density > 0.0):
            raise UserError("at least one density must be positive")

    @cached_property
    def _t(self) -> FloatArray:
        return np.array([point[0] for point in self.points], dtype=np.float64)

    @cached_property
    def _density_and_cdf(self) -> tuple[FloatArray, FloatArray]:
        """Normalised density and CDF at the points (trapezoids are exact for a linear density)."""
        density = np.array([point[1] for point in self.points], dtype=np.float64)
        area = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(self._t))])
        return density / area[-1], area / area[-1]

    @cached_property
    def _slope(self) -> FloatArray:
        return np.asarray(np.diff(self._density_and_cdf[0]) / np.diff(self._t))

    def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Linear interpolation between the points."""
        return np.interp(t, self._t, self._density_and_cdf[0], left=0.0, right=0.0)

    def cdf(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Equal to F_k + p_k d + s_k d^2 / 2 at distance d beyond point k."""
        t = np.clip(np.asarray(t, dtype=np.float64), self._t[0], self._t[-1])
        density, cdf = self._density_and_cdf
        k = np.clip(np.searchsorted(self._t, t, side="right") - 1, 0, len(self._slope) - 1)
        d = t - self._t[k]
        return np.clip(cdf[k] + density[k] * d + 0.5 * self._slope[k] * d * d, 0.0, 1.0)

    def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
        """The root of the segment's quadratic, in the form that does not cancel."""
        u = np.asarray(u, dtype=np.float64)
        density, cdf = self._density_and_cdf
        # The first segment that reaches u; u = 0 belongs to the first one with any mass.
        k = np.clip(np.searchsorted(cdf, np.maximum(u, 5e-324), side="left") - 1, 0, len(self._slope) - 1)
        rest = np.maximum(u - cdf[k], 0.0)
        root = np.sqrt(np.maximum(density[k] ** 2 + 2.0 * self._slope[k] * rest, 0.0))
        with np.errstate(divide="ignore", invalid="ignore"):
            d = np.where(rest > 0.0, 2.0 * rest / (density[k] + root), 0.0)
        return np.clip(self._t[k] + d, self._t[k], self._t[k + 1])

    def has_full_support(self) -> bool:
        """Positive at every point, and the points span [0, 1]."""
        return bool(self._t[0] == 0.0 and self._t[-1] == 1.0 and np.all(self._density_and_cdf[0] > 0.0))

    @classmethod
    def from_text(cls, arguments: str) -> Knots:
        """Build from the name of a file."""
        return cls.from_mapping({"file": arguments})

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Knots:
        """Build from `points: [[t, density], ...]` or `file: NAME`."""
        if "file" not in options:
            check_keys(options, required=["points"])
            return cls(_pairs(options["points"], "points"))
        check_keys(options, required=["file"])
        return cls(_pairs(_read_points(str(options["file"])), str(options["file"])), file=str(options["file"]))

    def __str__(self) -> str:
        return f"knots:{self.file or ' '.join(f'({t:g},{density:g})' for t, density in self.points)}"


def _pairs(value: object, source: str) -> tuple[tuple[float, float], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{source} must be a list of [t, density]")
    for item in value:
        if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 2:
            raise UserError(f"every point in {source} must be [t, density], got {quote(item)}")
    return tuple((number(item[0], f"{source}: t"), number(item[1], f"{source}: density")) for item in value)


def _read_points(path: str) -> object:
    """Points from a JSON list, or from lines of two numbers (blank or comma between them, # for comments)."""
    way_out = "write [t, density] points into it"
    data = read_regular(Path(path), way_out)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the points file {path!r} is not UTF-8: {error}") from None
    if text.lstrip().startswith("["):
        return parse_json(text, path, way_out)
    lines = (line.partition("#")[0].replace(",", " ").split() for line in text.splitlines())
    return [line for line in lines if line]

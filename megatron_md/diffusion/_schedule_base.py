"""What a mask schedule is, the registry of their names, and how one is read from a config (use it through `schedule`).

A schedule is written `name:number,number` (`uniform:0.45,0.55`, `beta:2,3`, `point:0.5`, `knots:FILE`) or, when it is
made of others, as a mapping (`{name: mixture, components: [{weight: 0.8, schedule: "uniform:0,1"}, ...]}`); those of
`schedule_presets` have a name alone (`paper`). Third parties add theirs with `@register_schedule("name")` on a
subclass of `MaskSchedule`, in a module that the config lists under `imports`. numpy only, so that a config can be
checked without torch.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_md.diffusion.registry import Registry
from megatron_md.errors import UserError
from megatron_md.messages import nearest

FloatArray = npt.NDArray[np.float64]

_QUADRATURE_POINTS = 1 << 15
_SUPPORT_GRID = np.linspace(0.0, 1.0, (1 << 14) + 1)


class MaskSchedule(ABC):
    """Distribution of the mask rate t on [0, 1]; `progress` in [0, 1] is the share of the run's tokens seen so far.

    A subclass gives `density` and `inverse_cdf`; the rest follows from them, and closed forms may replace it.
    """

    @abstractmethod
    def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Probability density at each t; infinite at an atom."""

    @abstractmethod
    def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
        """The smallest t with P(rate <= t) >= u, for each u in [0, 1]."""

    def cdf(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """P(rate <= t) for each t."""
        t = np.asarray(t, dtype=np.float64)
        return first_true(lambda u: self.inverse_cdf(u, progress) > t, np.zeros_like(t), np.ones_like(t))

    def sample(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
        """Mask rates, float64, from uniforms u in [0, 1).

        Raises:
            UserError: a (third-party) schedule left [0, 1].
        """
        t = np.asarray(self.inverse_cdf(np.asarray(u, dtype=np.float64), progress), dtype=np.float64)
        if not np.all((t >= 0.0) & (t <= 1.0)):
            raise UserError(f"mask schedule {self} gave a mask rate outside [0, 1]")
        return t

    def expectation(self, function: Callable[[FloatArray], FloatArray], progress: float = 0.0) -> float:
        """E[function(t)], by the midpoint rule in u = F(t)."""
        u = (np.arange(_QUADRATURE_POINTS) + 0.5) / _QUADRATURE_POINTS
        return float(np.mean(function(self.sample(u, progress))))

    def mean(self, progress: float = 0.0) -> float:
        """E[t]."""
        return self.expectation(lambda t: t, progress)

    def has_full_support(self) -> bool:
        """Whether the density is positive on all of [0, 1] (seen on a fine grid) during the whole run."""
        return all(np.all(self.density(_SUPPORT_GRID, progress) > 0.0) for progress in np.linspace(0.0, 1.0, 17))

    @classmethod
    def from_text(cls, arguments: str) -> MaskSchedule:
        """Build from what follows the colon: the constructor's numbers, separated by commas.

        Raises:
            UserError: a wrong count or something that is no number.
        """
        names = list(inspect.signature(cls).parameters)
        words = arguments.split(",") if arguments else []
        if len(words) != len(names):
            raise UserError(f"takes {len(names)} number(s) ({','.join(names)}), got {len(words)}")
        return cls(*(number(word, name) for word, name in zip(words, names, strict=True)))

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> MaskSchedule:
        """Build from the keys beside `name`: the constructor's numbers by name.

        Raises:
            UserError: a missing or unknown key, or something that is no number.
        """
        check_keys(options, required=list(inspect.signature(cls).parameters))
        return cls(**{key: number(value, key) for key, value in options.items()})


class ScheduleReader(Protocol):
    """What a name is registered for: a class of schedules, or whatever else makes one of what a config says."""

    def from_text(self, arguments: str, /) -> MaskSchedule:
        """The schedule that is written `name:arguments`."""

    def from_mapping(self, options: Mapping[str, Any], /) -> MaskSchedule:
        """The schedule that is written as a mapping, without its `name`."""


_registry: Registry[ScheduleReader] = Registry("mask schedule")
register_schedule = _registry.register


def parse_schedule(spec: str | Mapping[str, Any]) -> MaskSchedule:
    """The schedule that a config's `mask_schedule` describes.

    Raises:
        UserError: one line that quotes the spec and says what is wrong with it.
    """
    try:
        if isinstance(spec, str):
            name, _, arguments = spec.partition(":")
            return _registry.get(name.strip()).from_text(arguments.strip())
        if isinstance(spec, Mapping):
            if not isinstance(spec.get("name"), str):
                raise UserError("a mapping needs a `name`")
            options = {key: value for key, value in spec.items() if key != "name"}
            return _registry.get(spec["name"]).from_mapping(options)
    except ValueError as error:
        raise UserError(f"mask_schedule {quote(spec)}: {error}") from None
    raise UserError(f"mask_schedule must be text like uniform:0.45,0.55 or a mapping, got {quote(spec)}")


def first_true(holds: Callable[[FloatArray], npt.NDArray[np.bool_]], low: FloatArray, high: FloatArray) -> FloatArray:
    """The smallest float in [low, high] where the monotone predicate holds, element by element; high if nowhere."""
    high = np.where(holds(low), low, high)
    for _ in range(80):
        middle = 0.5 * (low + high)
        if np.all((middle <= low) | (middle >= high)):
            break
        is_right = holds(middle)
        low, high = np.where(is_right, low, middle), np.where(is_right, middle, high)
    return high


def number(value: object, key: str) -> float:
    """`value` as a finite float, or a UserError that names the key."""
    try:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            result = float(value)
            if math.isfinite(result):
                return result
    except (ValueError, OverflowError):
        pass
    raise UserError(f"{key} must be a finite number, got {quote(value)}")


def check_keys(options: Mapping[str, Any], *, required: list[str]) -> None:
    """Refuse unknown and missing keys of a mapping."""
    for key in options:
        if key not in required:
            raise UserError(f"unknown key {key!r}{nearest(str(key), required)} (known: {', '.join(required)})")
    for key in required:
        if key not in options:
            raise UserError(f"key {key!r} is missing (needs {', '.join(required)})")


def quote(spec: object) -> str:
    """The spec as it goes into an error message, shortened."""
    text = repr(spec)
    return text if len(text) <= 120 else f"{text[:117]}..."

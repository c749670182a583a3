"""Mask schedules made of others: a weighted sum of them, one after another over the run, one that becomes another."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np

from megatron_md.diffusion._schedule_base import (
    FloatArray,
    MaskSchedule,
    check_keys,
    first_true,
    number,
    parse_schedule,
    quote,
    register_schedule,
)
from megatron_md.errors import UserError


class _Composite(MaskSchedule):
    """A schedule made of others, in a config a list `_list` of `{_number: x, schedule: SPEC}`."""

    _list: ClassVar[str]
    _number: ClassVar[str]

    def __init__(self, parts: tuple[MaskSchedule, ...], numbers: tuple[float, ...]) -> None:
        raise NotImplementedError

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build from the list of parts."""
        check_keys(options, required=[cls._list])
        items = _mappings(options[cls._list], cls._list, [cls._number, "schedule"])
        return cls(
            tuple(parse_schedule(item["schedule"]) for item in items),
            tuple(number(item[cls._number], cls._number) for item in items),
        )

    @classmethod
    def from_text(cls, arguments: str) -> Self:
        """Refused: composites are mappings."""
        name = cls.__name__.lower()
        raise UserError(
            f"is written as a mapping: {{name: {name}, {cls._list}: [{{{cls._number}: 1, schedule: ...}}]}}"
        )


@register_schedule("mixture")
@dataclass(frozen=True)
class Mixture(_Composite):
    """A weighted sum of schedules; its strata are strata of the whole sum.

    Attributes:
        components: the schedules.
        weights: their positive weights, normalised to sum 1.
    """

    _list, _number = "components", "weight"
    components: tuple[MaskSchedule, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.components:
            raise UserError("components must not be empty")
        if any(weight <= 0.0 for weight in self.weights):
            raise UserError(f"every weight must be positive, got {', '.join(f'{weight:g}' for weight in self.weights)}")
        total = math.fsum(self.weights)
        object.__setattr__(self, "weights", tuple(weight / total for weight in self.weights))

    def _sum(self, values: Sequence[FloatArray]) -> FloatArray:
        return np.asarray(sum(w * value for w, value in zip(self.weights, values, strict=True)), dtype=np.float64)

    def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Weighted sum of the components' densities."""
        return self._sum([component.density(t, progress) for component in self.components])

    def cdf(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Weighted sum of the components' CDFs."""
        return self._sum([component.cdf(t, progress) for component in self.components])

    def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
        """Bisection of the mixture's CDF, to the last bit, between the smallest and largest component's value."""
        u = np.asarray(u, dtype=np.float64)
        values = np.stack([component.inverse_cdf(u, progress) for component in self.components])
        return first_true(lambda t: self.cdf(t, progress) >= u, values.min(axis=0), values.max(axis=0))

    def expectation(self, function: Callable[[FloatArray], FloatArray], progress: float = 0.0) -> float:
        """Weighted sum of the components' expectations."""
        values = [component.expectation(function, progress) for component in self.components]
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))

    def mean(self, progress: float = 0.0) -> float:
        """Weighted sum of the components' means."""
        values = [component.mean(progress) for component in self.components]
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))

    def has_full_support(self) -> bool:
        """Whether a component's support is full, or the sum's is."""
        return any(component.has_full_support() for component in self.components) or super().has_full_support()

    def __str__(self) -> str:
        terms = (f"{weight:g}*{part}" for weight, part in zip(self.weights, self.components, strict=True))
        return f"mixture({' + '.join(terms)})"


class Staged(MaskSchedule):
    """A schedule that is another one at each progress."""

    @abstractmethod
    def stage(self, progress: float) -> MaskSchedule:
        """The schedule that holds at `progress`."""

    def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """The current stage's density."""
        return self.stage(progress).density(t, progress)

    def cdf(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """The current stage's CDF."""
        return self.stage(progress).cdf(t, progress)

    def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
        """The current stage's inverse CDF."""
        return self.stage(progress).inverse_cdf(u, progress)

    def expectation(self, function: Callable[[FloatArray], FloatArray], progress: float = 0.0) -> float:
        """The current stage's expectation."""
        return self.stage(progress).expectation(function, progress)

    def mean(self, progress: float = 0.0) -> float:
        """The current stage's mean."""
        return self.stage(progress).mean(progress)


@register_schedule("curriculum")
@dataclass(frozen=True)
class Curriculum(_Composite, Staged):
    """One schedule after another: stage i holds while progress < untils[i].

    Attributes:
        stages: the schedules.
        untils: the progress at which each one ends, increasing; the last one is 1.
    """

    _list, _number = "stages", "until"
    stages: tuple[MaskSchedule, ...]
    untils: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("stages must not be empty")
        if self.untils[0] <= 0.0 or any(later <= earlier for earlier, later in pairwise(self.untils)):
            raise UserError(f"`until` must be positive and increase, got {', '.join(f'{u:g}' for u in self.untils)}")
        if self.untils[-1] != 1.0:
            raise UserError(f"the last stage must have until: 1, got {self.untils[-1]:g}")

    def stage(self, progress: float) -> MaskSchedule:
        """The schedule that holds at `progress`; the last one also at 1."""
        index = int(np.searchsorted(self.untils, progress, side="right"))
        return self.stages[min(index, len(self.stages) - 1)]

    def has_full_support(self) -> bool:
        """Whether every stage's support is full."""
        return all(stage.has_full_support() for stage in self.stages)

    def __str__(self) -> str:
        terms = (f"{stage} until {until:g}" for stage, until in zip(self.stages, self.untils, strict=True))
        return f"curriculum({', '.join(terms)})"


@register_schedule("anneal")
@dataclass(frozen=True)
class Anneal(Staged):
    """One schedule that becomes another: the mixture (1 - w) first + w last, w rising linearly from 0 to 1.

    Attributes:
        first: the schedule up to progress `begin`.
        last: the schedule from progress `end` on.
        begin: progress at which it begins to change.
        end: progress at which it has changed.
    """

    first: MaskSchedule
    last: MaskSchedule
    begin: float
    end: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.begin < self.end <= 1.0:
            raise UserError(f"over must be [begin, end] with 0 <= begin < end <= 1, got [{self.begin:g}, {self.end:g}]")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Build from `from`, `to` and `over: [begin, end]`, or `over: end` for [0, end]."""
        check_keys(options, required=["from", "to", "over"])
        over = options["over"] if isinstance(options["over"], Sequence) else [0.0, options["over"]]
        if isinstance(over, str) or len(over) != 2:
            raise UserError(f"over must be [begin, end], got {quote(options['over'])}")
        begin, end = (number(edge, "over") for edge in over)
        return cls(parse_schedule(options["from"]), parse_schedule(options["to"]), begin, end)

    @classmethod
    def from_text(cls, arguments: str) -> Self:
        """Refused: it is a mapping."""
        raise UserError("is written as a mapping: {name: anneal, from: ..., to: ..., over: [0.7, 1]}")

    def stage(self, progress: float) -> MaskSchedule:
        """The schedule that holds at `progress`."""
        weight = (progress - self.begin) / (self.end - self.begin)
        if weight <= 0.0:
            return self.first
        return self.last if weight >= 1.0 else Mixture((self.first, self.last), (1.0 - weight, weight))

    def has_full_support(self) -> bool:
        """Whether it is full at the start and at the end, hence between them."""
        return all(self.stage(progress).has_full_support() for progress in (0.0, 1.0))

    def __str__(self) -> str:
        return f"anneal({self.first} to {self.last} over {self.begin:g} to {self.end:g})"


def _mappings(value: object, key: str, required: list[str]) -> list[Mapping[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(i, Mapping) for i in value):
        raise UserError(f"{key} must be a list of {{{', '.join(f'{name}: ...' for name in required)}}}")
    for item in value:
        check_keys(item, required=required)
    return list(value)

"""What a sweep runs: every arm at every point of the grid with every seed, each in a directory of its own."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Generic, TypeVar

from megatron_md.config.loader import ConfigError
from megatron_md.config.schema import STRICT, Doc, Seed

C = TypeVar("C")


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep runs: every arm at every point of the grid with every seed."""

    __pydantic_config__ = STRICT

    seeds: Annotated[list[Seed], Doc("seeds of the runs of each arm; [seed] if empty")] = field(default_factory=list)
    arms: Annotated[
        dict[str, list[str]], Doc("name of each arm: its section.key=value words; one arm, as configured, if empty")
    ] = field(default_factory=dict)
    grid: Annotated[
        dict[str, list[int | float | str | None]], Doc("section.key: values; each arm is run at every combination")
    ] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepRun(Generic[C]):
    """One run of a sweep.

    Attributes:
        arm: what it is a run of.
        point: where on the grid; empty where there is none.
        seed: its seed.
        directory: where it is.
        config: it.
    """

    arm: str
    point: str
    seed: int
    directory: Path
    config: C

    @property
    def name(self) -> str:
        """Arm and point."""
        return _name(self.arm, self.point)


def expand(
    sweep: SweepConfig, directory: Path, seed: int, build: Callable[[Sequence[str]], C], check: Callable[[C], object]
) -> list[SweepRun[C]]:
    """The runs of a sweep: all arms with the first seed, then all with the second, and so on.

    Args:
        sweep: the arms.
        directory: of the sweep; each run gets `ARM/seed_N` in it.
        seed: where `sweep.seeds` is empty.
        build: the config with `section.key=value` words applied.
        check: refuses a config that cannot be run.

    Raises:
        ConfigError: an arm's words cannot be applied, an arm cannot be run, or two arms would share a directory.
    """
    arms = _arms_on_grid(sweep)
    folders = [_folder(_name(arm, point)) for arm, point, _ in arms]
    for name in sorted({name for name in folders if folders.count(name) > 1}):
        raise ConfigError([f"sweep.arms: two arms would be written to {name}; give them other names"])
    runs: list[SweepRun[C]] = []
    for number in sweep.seeds or [seed]:
        for (arm, point, words), folder in zip(arms, folders, strict=True):
            place = directory / folder / f"seed_{number}"
            try:
                config = build([*words, f"seed={number}", f"run_dir={json.dumps(str(place))}"])
                if len(runs) < len(arms):  # seeds change nothing about what can be run
                    check(config)
            except ConfigError as error:
                raise ConfigError([f"sweep.arms[{_name(arm, point)}]: {line}" for line in error.lines]) from None
            runs.append(SweepRun(arm, point, number, place, config))
    return runs


def _arms_on_grid(sweep: SweepConfig) -> list[tuple[str, str, list[str]]]:
    """(arm, point, words) of each arm at each point of the grid."""
    points: list[tuple[str, list[str]]] = [
        (
            ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in zip(sweep.grid, values, strict=True)),
            [f"{key}={json.dumps(value)}" for key, value in zip(sweep.grid, values, strict=True)],
        )
        for values in itertools.product(*sweep.grid.values())
    ]
    arms = sweep.arms or {"run": []}
    return [(arm, point, [*words, *more]) for arm, words in arms.items() for point, more in points]


def _name(arm: str, point: str) -> str:
    return f"{arm}, {point}" if point else arm


def _folder(arm: str) -> str:
    return re.sub(r"[^\w.]+", "_", arm).strip("_") or "arm"

"""The picture of a sweep: accuracies against steps, one colour an arm, beside the theory's P_S."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_md.evaluate.plot import COLORS, plain, read_metrics, save_figure
from megatron_md.parity.sweep import rows_of
from megatron_md.sweep.table import by_arm

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ArmCurves:
    """An arm's accuracies over its seeds.

    Attributes:
        name: of the arm.
        steps: where accuracy was measured, over all seeds.
        train, valid: accuracies [seeds, steps]; a run that has ended keeps its last ones.
        signal_probability: the theory's P_S, or None.
    """

    name: str
    steps: FloatArray
    train: FloatArray
    valid: FloatArray
    signal_probability: float | None


def arm_curves(directory: Path) -> list[ArmCurves]:
    """The curves of a sweep's arms, from DIRECTORY/parity.csv and its runs.

    Raises:
        UserError: there is no sweep, or one of its runs has no metrics.
    """
    arms = []
    for name, rows in by_arm(rows_of(directory)).items():
        runs = [_measured(read_metrics(directory / row["run"])) for row in rows]
        steps = np.unique(np.concatenate([run["step"] for run in runs]))
        # The index of the last measurement at or before each step.
        last = [np.maximum(np.searchsorted(run["step"], steps, side="right") - 1, 0) for run in runs]
        train, valid = (
            np.stack([run[key][index] for run, index in zip(runs, last, strict=True)])
            for key in ("train_accuracy", "valid_accuracy")
        )
        probability = rows[0]["signal_probability"]
        arms.append(ArmCurves(name, steps, train, valid, float(probability) if probability else None))
    return arms


def _measured(records: Sequence[dict[str, Any]]) -> dict[str, FloatArray]:
    keys = ("step", "train_accuracy", "valid_accuracy")
    measured = [record for record in records if record.keys() >= set(keys)]
    return {key: np.array([record[key] for record in measured], dtype=np.float64) for key in keys}


def plot_sweep(directory: Path, output: Path) -> None:
    """Draw a sweep.

    Raises:
        UserError: see `arm_curves`, or the picture's format is unknown.
    """
    arms = arm_curves(directory)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 6.0), layout="constrained")
    axes: dict[str, Any] = figure.subplot_mosaic([["valid", "signal"], ["train", "signal"]], width_ratios=[2.2, 1.0])
    longest = max(float(arm.steps[-1]) for arm in arms)
    for number, arm in enumerate(arms):
        color = COLORS[number % len(COLORS)]
        for key, values in (("valid", arm.valid), ("train", arm.train)):
            _draw_band(axes[key], arm, values, color, longest)
    for key, title in (("valid", "validation accuracy"), ("train", "training accuracy")):
        axes[key].axhline(0.5, color="#888888", linewidth=0.8, linestyle=":")
        axes[key].set(ylabel=title, ylim=(0.42, 1.02), xlim=(0.0, longest))
        axes[key].grid(alpha=0.25)
        axes[key].spines[["top", "right"]].set_visible(False)
    axes["valid"].set_title("label accuracy: median and range over seeds", fontsize="medium")
    axes["train"].set_xlabel("steps (a run that has ended keeps its last accuracy)")
    _draw_signal(axes["signal"], arms)
    save_figure(figure, output)


def _draw_band(axes: Any, arm: ArmCurves, values: FloatArray, color: str, longest: float) -> None:
    """Median and range over seeds, from chance at step 0 on, drawn out to the longest arm."""
    steps = np.concatenate([[0.0], arm.steps, [longest]])
    start = np.full((len(values), 1), 0.5)
    values = np.concatenate([start, values, values[:, -1:]], axis=1)
    axes.plot(steps, np.median(values, axis=0), color=color, linewidth=1.6)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)


def _draw_signal(axes: Any, arms: Sequence[ArmCurves]) -> None:
    """P_S of each arm as a bar in its colour; the bars' names are the legend of the whole picture."""
    for number, arm in enumerate(arms):
        color, value = COLORS[number % len(COLORS)], arm.signal_probability
        axes.barh(number, value or 0.0, color=color, height=0.55)
        seeds = f"{plain(arm.name)} ({len(arm.valid)} seed{'s' if len(arm.valid) > 1 else ''})"
        axes.text(0.004, number - 0.3, seeds, color=color, va="bottom", fontsize="small", fontweight="bold")
        axes.text((value or 0.0) + 0.004, number, "no schedule" if value is None else f"{value:.3f}", va="center")
    largest = max((arm.signal_probability or 0.0 for arm in arms), default=0.0)
    axes.set(ylim=(max(len(arms), 5) - 0.4, -0.7), yticks=[], xlim=(0.0, max(0.45, 1.25 * largest)))
    axes.set_xlabel("share of masks in the signal regime\n$P_S = (k+1)\\, E[t(1-t)^k]$")
    axes.set_title("theory", fontsize="medium")
    axes.spines[["top", "right", "left"]].set_visible(False)

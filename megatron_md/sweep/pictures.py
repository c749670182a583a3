"""The pictures of a study: NELBO against tokens, differences with their intervals, cross-entropy by mask rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_md.evaluate.plot import arm_colors, plain, save_figure
from megatron_md.sweep.figures import ArmFigures


def draw_study(points: dict[str, list[ArmFigures]], directory: Path) -> dict[str, Path]:
    """Draw all pictures, a panel for each point of the grid: what each shows, and its file."""
    names = list(dict.fromkeys(arm.name for arms in points.values() for arm in arms))
    colors = dict(zip(names, arm_colors(len(names)), strict=True))
    drawn = {
        "NELBO against tokens: median and range over seeds": ("nelbo.png", _draw_curves),
        "Difference of the final NELBO from the reference": ("differences.png", _draw_differences),
        "Cross-entropy by mask rate at the end": ("ce_by_rate.png", _draw_rates),
    }
    for name, draw in drawn.values():
        figure, panels = _panels(len(points), 0.25 * len(names) + 1.5)
        for axes, (point, arms) in zip(panels, points.items(), strict=True):
            draw(axes, arms, colors)
            axes.set_title(plain(point), fontsize="medium")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        save_figure(figure, directory / name)
    return {text: directory / name for text, (name, _) in drawn.items()}


def _panels(count: int, least: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(8.5 if columns == 1 else 13.0, rows * max(4.2, least)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for empty in panels[count:]:
        empty.remove()
    return figure, panels[:count]


def _draw_curves(axes: Any, arms: Sequence[ArmFigures], colors: dict[str, Any]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    for arm in arms:
        tokens = sorted(set.intersection(*(set(run.tokens) for run in arm.runs)))
        nelbo_SX = np.array([[run.nelbo[run.tokens.index(value)] for value in tokens] for run in arm.runs])
        style = {"color": colors[arm.name], "linestyle": "--" if arm is arms[0] else "-"}
        median_X = np.median(nelbo_SX, axis=0)
        axes.plot(tokens, median_X, label=plain(arm.name), linewidth=1.4, **style)
        if any(run.has_overfitted for run in arm.runs):
            axes.plot(
                tokens[median_X.argmin()], median_X.min(), color=colors[arm.name], marker="*", markersize=12, ls=""
            )
        axes.fill_between(
            tokens, nelbo_SX.min(axis=0), nelbo_SX.max(axis=0), color=colors[arm.name], alpha=0.12, linewidth=0
        )
    axes.set(xlabel="training tokens", ylabel="NELBO, nats per token", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize="small")


def _draw_differences(axes: Any, arms: Sequence[ArmFigures], colors: dict[str, Any]) -> None:
    compared = [(arm, arm.difference) for arm in arms if arm.difference is not None]
    for height, (arm, found) in enumerate(compared):
        low, high = max(found.mean - found.low, 0.0), max(found.high - found.mean, 0.0)
        axes.errorbar(found.mean, height, xerr=[[low], [high]], fmt="o", color=colors[arm.name], capsize=3)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(compared)), [plain(arm.name) for arm, _ in compared])
    axes.set_ylim(max(len(compared), 2) - 0.5, -0.5)
    axes.set_xlabel(f"NELBO less that of {plain(arms[0].name)}, nats per token (95 %)")


def _draw_rates(axes: Any, arms: Sequence[ArmFigures], colors: dict[str, Any]) -> None:
    for arm in arms:
        ce_SK = np.array([run.ce_by_rate for run in arm.runs])
        if np.isnan(ce_SK).all():  # a causal model
            continue
        rate_K = (np.arange(ce_SK.shape[1]) + 0.5) / ce_SK.shape[1]
        style = {"color": colors[arm.name], "linestyle": "--" if arm is arms[0] else "-"}
        axes.plot(rate_K, np.median(ce_SK, axis=0), label=plain(arm.name), marker="o", markersize=3, **style)
    axes.set(xlabel="mask rate t", ylabel="nats per masked token", xlim=(0.0, 1.0))
    axes.legend(frameon=False, fontsize="small")

"""The picture of `schedule fit`: signal and noise by mask rate, and the densities that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_md.evaluate.plot import COLORS, plain, save_figure

Window = tuple[float, float]


def plot_fit(figures: dict[str, Any], window: Window | None, output: Path) -> None:
    """Draw gain of a window by its place, and both densities, beside the n-grams' window.

    Args:
        figures: what `schedule fit` writes as JSON.
        window: what the corpus' n-grams predict, if they were read.
        output: the picture.

    Raises:
        UserError: the picture's format is unknown.
    """
    from matplotlib.figure import Figure

    edges = np.array(figures["edges"])
    middles = 0.5 * (edges[1:] + edges[:-1])
    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    gains, densities = figure.subplots(1, 2)
    found, errors = np.array(figures["window_gain"]), np.array(figures["window_gain_stderr"])
    gains.errorbar(middles, found, yerr=errors, color=COLORS[1], marker="o", markersize=4, capsize=2, linewidth=1.4)
    gains.axhline(1.0, color="black", linestyle="--", linewidth=1.0, label="U[0, 1]")
    gains.set(
        ylabel="rows of U[0, 1] that a row of the window is worth", title=f"windows of width {edges[1] - edges[0]:g}"
    )
    for number, (name, found_by) in enumerate(figures["densities"].items()):
        t, density = np.array(found_by["knots"]).T
        label = f"{name}: gain {found_by['gain']:.2f} ± {found_by['gain_stderr']:.2f}"
        densities.plot(t, density, color=COLORS[(1, 0)[number]], linewidth=1.6, label=label)
    densities.set(ylabel="density", title=plain(figures["run"]))
    for axes in (gains, densities):
        if window is not None:
            axes.axvspan(
                *window, color=COLORS[2], alpha=0.2, linewidth=0, label=f"n-grams: [{window[0]:g}, {window[1]:g}]"
            )
        axes.set(xlabel="mask rate t", xlim=(0.0, 1.0))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, output)

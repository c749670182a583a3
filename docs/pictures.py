"""Draws docs/pictures/, with the package's own code: python docs/pictures.py [FOLDER]."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

from megatron_md.diffusion.corruption import mask_at_rate
from megatron_md.diffusion.sampler import SamplerConfig, sample
from megatron_md.diffusion.schedule import parse_schedule

FOLDER = Path(__file__).parent / "pictures"
TEXT = re.findall(r"\w+", "the model sees the words that are left and fills in all those that are masked at once")
MASKED, PLAIN = "#0f766e", "#e5e7eb"


def draw_masking() -> plt.Figure:
    """One row at several mask rates: what is masked at a lower rate is masked at every higher one."""
    rates = np.array([0.15, 0.35, 0.5, 0.75, 0.95])
    is_maskable_BL = np.ones((len(rates), len(TEXT)), dtype=bool)
    is_masked_BL = mask_at_rate(3, np.zeros(len(rates), dtype=np.int64), rates, is_maskable_BL)
    widths = [0.75 + 0.42 * len(word) for word in TEXT]
    figure, axes = plt.subplots(figsize=(9, 2.4), layout="constrained")
    for line, (rate, is_masked_L) in enumerate(zip(rates, is_masked_BL, strict=True)):
        left = 0.0
        for word, width, is_masked in zip(TEXT, widths, is_masked_L, strict=True):
            color = MASKED if is_masked else PLAIN
            axes.add_patch(plt.Rectangle((left, -line - 0.4), width - 0.12, 0.8, color=color, lw=0))
            if not is_masked:
                axes.text(left + width / 2 - 0.06, -line, word, ha="center", va="center", fontsize=8)
            left += width
        axes.text(-0.3, -line, f"t = {rate:g}", ha="right", va="center", fontsize=9)
    axes.set(xlim=(-4, sum(widths)), ylim=(-len(rates) + 0.4, 0.6))
    axes.axis("off")
    return figure


def draw_attention() -> plt.Figure:
    """Which positions a position sees: causal and bidirectional."""
    figure, pair = plt.subplots(1, 2, figsize=(6, 2.9), layout="constrained")
    seen = np.ones((8, 8))
    for axes, sees, name in zip(pair, (np.tril(seen), seen), ("autoregressive", "masked diffusion"), strict=True):
        colors = matplotlib.colors.ListedColormap([PLAIN, MASKED])
        axes.pcolormesh(sees[::-1], cmap=colors, vmin=0, vmax=1, edgecolors="white", lw=1.5)
        axes.set(title=name, xlabel="sees position", xticks=[], yticks=[], aspect="equal")
    pair[0].set_ylabel("position")
    return figure


def draw_schedules() -> plt.Figure:
    """Densities of named schedules over the mask rate."""
    t = np.linspace(0.0, 1.0, 201)
    figure, panels = plt.subplots(1, 4, figsize=(10, 2.6), sharey=True, layout="constrained")
    for axes, name in zip(panels, ("llada", "paper", "bell", "window-uniform"), strict=True):
        stages = {0.0: "first half", 0.75: "at 75 %", 1.0: "end"} if name == "window-uniform" else {0.0: None}
        for (progress, label), alpha in zip(stages.items(), (1.0, 0.6, 0.3), strict=False):
            density = parse_schedule(name).density(t, progress)
            axes.fill_between(t, np.minimum(density, 10.5), color=MASKED, alpha=alpha * 0.5, lw=0)
            axes.plot(t, density, color=MASKED, alpha=alpha, label=label)
        axes.set(title=name, xlabel="mask rate t", ylim=(0, 10.5), xlim=(0, 1))
    panels[0].set_ylabel("density")
    panels[3].legend(fontsize=7, loc="upper left", handlelength=1, frameon=False)
    return figure


def draw_sampling() -> plt.Figure:
    """In which step each token of a canvas is fixed, by strategy; to the stand-in for a denoiser all are alike."""
    kinds = {
        "random": SamplerConfig(32, steps=8, strategy="random"),
        "random, blocks of 8": SamplerConfig(32, steps=8, strategy="random", block=8),
        "ancestral, 8 steps": SamplerConfig(32, steps=8, strategy="ancestral", temperature=1.0),
    }
    figure, panels = plt.subplots(len(kinds), 1, figsize=(9, 2.9), layout="constrained")
    for axes, (name, config) in zip(panels, kinds.items(), strict=True):
        done = sample(
            lambda tokens: torch.zeros(*tokens.shape, 5), torch.zeros(1, 0, dtype=torch.long), config, mask_token_id=4
        )
        drawn = axes.pcolormesh(done.fixed_step_BL.numpy(), cmap="viridis", vmin=1, vmax=8, edgecolors="white", lw=1.5)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    panels[-1].set_xlabel("position in the canvas")
    figure.colorbar(drawn, ax=panels, label="fixed in step", pad=0.01)
    return figure


def main() -> None:
    """Draw all of them."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "megatron_md"  # the same bytes every time
    drawings = {
        "masking": draw_masking,
        "attention": draw_attention,
        "schedules": draw_schedules,
        "sampling": draw_sampling,
    }
    for name, draw in drawings.items():
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

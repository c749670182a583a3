"""The page's charts: matplotlib's SVG, whose black is the page's ink and whose texts are texts."""

from __future__ import annotations

import colorsys
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from megatron_md.evaluate.plot import COLORS, draw_validation, plain, series
from megatron_md.html_page import escaped
from megatron_md.report.recorded import Recorded
from megatron_md.report.schedule import Densities, described
from megatron_md.train.records import has_overfitted, is_number, lowest

T = TypeVar("T")
SIZE = (5.2, 3.2)  # inches: as wide as a phone, so that texts are drawn there in their own size
MOST_POINTS = 400  # of a curve; beyond them a point is the mean of several, and of one run a band their range
LONGEST_LABEL = 200  # characters
MOST_RATES = 5  # validations of one run whose cross-entropy by mask rate is drawn


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Attributes:
        title: what it shows.
        svg: the drawing; empty where there is nothing to draw.
        absent: what is told instead.
    """

    title: str
    svg: str
    absent: str = ""


@dataclass(frozen=True)
class _Metric:
    key: str
    title: str
    absent: str = "not logged"
    is_log: bool = False
    is_steady: bool = False  # of many values some are drawn, not means


_METRICS = (
    _Metric("loss", "Loss: the training objective, nats per token"),
    _Metric("masked_ce", "Cross-entropy at masked tokens (training), nats"),
    _Metric("lr", "Learning rate", is_steady=True),
    _Metric("grad_norm", "Gradient norm before clipping", is_log=True),
    _Metric("tokens_per_second", "Throughput, tokens per second"),
    _Metric("mfu", "Model FLOPs utilisation", "not logged: the peak of the device is not known"),
    _Metric("memory_gib", "Peak memory of the main process, GiB", is_steady=True),
    _Metric("skipped_total", "Skipped steps, in all", "no step was skipped", is_steady=True),
)


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def draw_charts(runs: Sequence[Recorded]) -> list[Chart]:
    """All charts of a run, or of several in the same axes, without a legend then: `run_colors` is that of all."""
    own: dict[str, Any] = {"runs": runs, "colors": _colors(len(runs))}
    chart = partial(_chart, has_legend=len(runs) == 1)
    metrics = [chart(kind.title, partial(_draw_metric, metric=kind, **own), kind.absent) for kind in _METRICS]
    return [
        chart(
            "Validation NELBO, nats per token, ± one standard error",
            partial(_draw_nelbo, **own),
            "no validation yet: validation.every_steps asks for them",
        ),
        chart(
            "Cross-entropy by mask rate (validation), nats per masked token",
            partial(_draw_rates, **own),
            "no validation of a masked model yet",
        ),
        *metrics,
        chart("Events", partial(_draw_events, **own), "events.jsonl has none"),
    ]


def run_colors(count: int) -> list[str]:
    """The runs' colours in the charts, as CSS."""
    return [_named_colors(color.lower()) for color in _colors(count)]


def draw_schedules(runs: Sequence[Recorded]) -> list[Chart]:
    """The density of the mask rate at the start, in the middle and at the end of the run, of each schedule once."""
    found: dict[str, Densities | None] = {}
    for run in runs:
        found.setdefault(*described(run.config))
    return [
        _chart(
            label if len(label) <= LONGEST_LABEL else f"{label[:LONGEST_LABEL]}…",
            partial(_draw_densities, law=law),
            "not drawn: there are no rates, or they come from a file or module that is not read here",
        )
        for label, law in found.items()
    ]


def _colors(count: int) -> list[str]:
    """A colour for each run that reads on a light page and on a dark one."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    channels = (colorsys.hls_to_rgb(number / count, 0.5, 0.65) for number in range(count))
    return ["#" + "".join(f"{round(255 * channel):02x}" for channel in rgb) for rgb in channels]


def _chart(title: str, draw: Callable[[Any], bool], absent: str, *, has_legend: bool = True) -> Chart:
    """A chart, if `draw` has found something."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10, "axes.formatter.use_mathtext": False}
    with rc_context(settings):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        if not draw(axes):
            return Chart(title, "", absent)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        if labels and has_legend:
            axes.legend(handles, labels, frameon=False, fontsize=9)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Chart(title, _inline(buffer.getvalue(), title))


def _inline(document: str, title: str) -> str:
    """An SVG document as a part of a page: without what a document alone needs, in colours that the page names."""
    svg = document[document.index("<svg") :].rstrip()
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would hold for the whole page, which has its own
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # alike in all charts; what is referred to is named by a salted hash
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    return _named_colors(svg).replace("<svg", f'<svg role="img" aria-label="{escaped(title)}"', 1)


def _named_colors(text: str) -> str:
    """Colours as variables of the page, which has them lighter where it is dark; black is its ink."""
    text = text.replace("#000000", "currentColor").replace("#8c1c13", "var(--warn)")
    for number, color in enumerate(COLORS):
        text = text.replace(color.lower(), f"var(--color-{number})")
    return text


def _tokens_axis(axes: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _number(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _draw_nelbo(axes: Any, runs: Sequence[Recorded], colors: Sequence[Any]) -> bool:
    drawn = False
    for run, color in zip(runs, colors, strict=True):
        scored = [record for record in run.records if is_number(record.get("val_nelbo"))]
        kept = spread(scored, MOST_POINTS)
        best = lowest(scored)
        if best is not None and has_overfitted(scored) and best not in kept:
            kept = sorted([*kept, best], key=lambda record: int(record["step"]))
        if kept:
            drawn = True
            draw_validation(axes, kept, name="NELBO", color=color)
        entropy: Any = run.found.status.get("unigram_entropy")
        if len(runs) == 1 and kept and is_number(entropy) and abs(entropy) < 1e3:
            axes.axhline(entropy, color="black", linestyle="--", linewidth=1.0, label=f"unigram entropy {entropy:.3f}")
    _tokens_axis(axes)
    return drawn


def _draw_rates(axes: Any, runs: Sequence[Recorded], colors: Sequence[Any]) -> bool:
    drawn = False
    for run, color in zip(runs, colors, strict=True):
        scored = [record for record in run.records if _has_rates(record)]
        shown = spread(scored, MOST_RATES) if len(runs) == 1 else scored[-1:]
        for number, record in enumerate(shown, start=1):
            ce_K = np.array([float(ce) if is_number(ce) else np.nan for ce in record["val_ce_by_rate"]])
            rate_K = (np.arange(len(ce_K)) + 0.5) / len(ce_K)
            label = f"step {record['step']:,}"
            style = {"color": color, "alpha": number / len(shown), "linewidth": 1.4}
            axes.plot(rate_K, ce_K, label=label, marker="o", markersize=2.5, **style)
            drawn = True
    axes.set(xlabel="mask rate t", xlim=(0.0, 1.0))
    return drawn


def _has_rates(record: dict[str, Any]) -> bool:
    rates = record.get("val_ce_by_rate")
    if not isinstance(rates, list) or len(rates) > 1000:
        return False
    return any(is_number(ce) and abs(ce) < 1e6 for ce in rates) and all(
        ce is None or (is_number(ce) and abs(ce) < 1e6) for ce in rates
    )


def _draw_metric(axes: Any, runs: Sequence[Recorded], colors: Sequence[Any], metric: _Metric) -> bool:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    curves = [series(run.records, metric.key) for run in runs]
    values = [value for _, own in curves for value in own]
    if not values or (metric.key == "skipped_total" and not any(values)):
        return False
    for color, (tokens, own) in zip(colors, curves, strict=True):
        if metric.is_steady:
            tokens, own = spread(tokens, MOST_POINTS), spread(own, MOST_POINTS)
        if own:
            _draw_curve(axes, tokens, own, color, with_band=len(runs) == 1)
    axes.yaxis.set_major_formatter(FuncFormatter(_number))
    if metric.is_log and min(values) > 0.0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif metric.key in ("lr", "tokens_per_second", "mfu", "memory_gib", "skipped_total"):
        axes.set_ylim(bottom=min(0.0, min(values)))
    _tokens_axis(axes)
    return True


def _draw_curve(axes: Any, tokens: Sequence[float], values: Sequence[float], color: Any, *, with_band: bool) -> None:
    if len(values) <= MOST_POINTS:
        axes.plot(tokens, values, color=color, linewidth=1.2)
        return
    starts = np.linspace(0, len(values), MOST_POINTS, endpoint=False).astype(int)
    counts = np.diff([*starts, len(values)])
    at, mean = (np.add.reduceat(np.asarray(all_), starts) / counts for all_ in (tokens, values))
    axes.plot(at, mean, color=color, linewidth=1.2)
    if with_band:
        low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        axes.fill_between(at, low, high, color=color, alpha=0.3, linewidth=0.6)  # its edge shows a single spike


def _draw_events(axes: Any, runs: Sequence[Recorded], colors: Sequence[Any]) -> bool:
    """A row for each kind of event, at the steps where they were; what has no step is in the table only."""
    from matplotlib.ticker import FuncFormatter

    kinds: dict[str, int] = {}
    for number, (run, color) in enumerate(zip(runs, colors, strict=True)):
        at: dict[str, list[float]] = {}
        for event in run.events:
            if is_number(event.get("step")) and 0 <= event["step"] < 1e15:
                at.setdefault(str(event["event"]), []).append(float(event["step"]))
        for kind, steps in list(at.items())[:20]:
            height = kinds.setdefault(kind, len(kinds)) + 0.5 * number / len(runs)
            steps = spread(sorted(steps), MOST_POINTS)
            axes.plot(steps, [height] * len(steps), "o", color=color, markersize=4, alpha=0.7)
    axes.set_yticks(range(len(kinds)), [plain(kind)[:20] for kind in kinds])
    axes.set_ylim(len(kinds) - 0.5, -0.7)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    return bool(kinds)


def _draw_densities(axes: Any, law: Densities | None) -> bool:
    if law is None:
        return False
    for number, (label, density_K) in enumerate(law.items()):
        edges = np.linspace(0.0, 1.0, len(density_K) + 1)
        style = {"color": COLORS[number], "linestyle": ("-", "--", ":")[number], "linewidth": 1.8 - 0.1 * number}
        axes.stairs(density_K, edges, label=label, **style)
    axes.set(xlabel="mask rate t", ylabel="density", xlim=(0.0, 1.0))
    axes.set_ylim(bottom=0.0)
    return True

"""The page of a run, or of several side by side: one HTML file that loads nothing and runs no script."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import resources

from megatron_md import __version__
from megatron_md.html_page import escaped, filled
from megatron_md.report.charts import MOST_POINTS, Chart, draw_charts, draw_schedules, run_colors
from megatron_md.report.facts import cost, facts
from megatron_md.report.recorded import Recorded
from megatron_md.report.tables import config_table, environment_table, events_table, facts_table, samples_list


def report_page(runs: Sequence[Recorded], *, price: float | None = None, refresh_seconds: float | None = None) -> str:
    """The page.

    Args:
        runs: one, or several to compare.
        price: of a device-hour, in whatever currency.
        refresh_seconds: the page loads itself anew that often; None: never.

    Returns:
        HTML in which no text of a run is markup.
    """
    page = resources.files("megatron_md.report").joinpath("page.html").read_text(encoding="utf-8")
    sections = {
        "Figures": facts_table(runs, [facts(run) for run in runs]) + _notes(runs),
        "Curves": _legend(runs) + _charts(draw_charts(runs)) + _CURVES_NOTE,
        "Mask schedule": _charts(draw_schedules(runs)),
        "Samples": samples_list(runs),
        "Cost": facts_table(runs, [cost(run, price) for run in runs]) + _COST_NOTE,
        "Config": config_table(runs),
        "Events": events_table(runs),
        "Environment": environment_table(runs),
    }
    refresh = ""
    if refresh_seconds is not None:
        refresh = f'<meta http-equiv="refresh" content="{max(1, round(refresh_seconds))}">\n'
    values = {
        "REFRESH": refresh,
        "TITLE": escaped(", ".join(run.name for run in runs)),
        "WRITTEN": f"{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}, megatron-md {__version__}",
        "BODY": "\n".join(f"<h2>{title}</h2>\n{html}" for title, html in sections.items()),
    }
    return filled(page, values)


_CURVES_NOTE = (
    f'<p class="faint">A curve of more than {MOST_POINTS} values has means of so many stretches, and their range as a '
    "band where there is one run.</p>"
)
_COST_NOTE = (
    '<p class="faint">FLOPs: of the tokens trained, recomputation included, as <code>train --dry-run</code> counts '
    "them. Device-hours: processes times the hours from each start to its last sign of life.</p>"
)


def _legend(runs: Sequence[Recorded]) -> str:
    """The colours of several runs, once for all charts."""
    colors = zip(run_colors(len(runs)), runs, strict=True)
    entries = (f'<span><b style="color: {color}">■</b> {escaped(run.name)}</span>' for color, run in colors)
    return f'<p class="legend">{" ".join(entries)}</p>' if len(runs) > 1 else ""


def _charts(charts: Sequence[Chart]) -> str:
    """The drawings in a grid, and below it a line for each that there is not."""
    drawn, absent = [], []
    for chart in charts:
        if chart.svg:
            drawn.append(f"<figure><figcaption>{escaped(chart.title)}</figcaption>\n{chart.svg}</figure>")
        else:
            absent.append(f'<p class="absent">{escaped(f"{chart.title}: {chart.absent}")}</p>')
    return f'<div class="charts">\n{"".join(drawn)}</div>{"".join(absent)}'


def _notes(runs: Sequence[Recorded]) -> str:
    told = [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.found.notes]
    notes = "".join(f"<li>{escaped(note)}</li>" for note in told)
    return f'<ul class="notes">{notes}</ul>' if notes else ""

"""What a study found, to read: final NELBO of the arms, paired differences, tokens to a NELBO, and three pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_md.files import replace_file
from megatron_md.messages import shown
from megatron_md.sweep.figures import ArmFigures, read_study
from megatron_md.sweep.pictures import draw_study

REPORT_NAME = "report.md"


def write_report(directory: Path, reference: str | None = None) -> str:
    """Write DIRECTORY/report.md and its pictures.

    Returns:
        The report, without the pictures.

    Raises:
        UserError: see `read_study`.
    """
    points = read_study(directory, reference)
    pictures = draw_study(points, directory)
    text = "\n\n".join(_section(point, arms) for point, arms in points.items())
    links = "".join(f"\n![{name}]({picture.name})\n" for name, picture in pictures.items())
    replace_file(directory / REPORT_NAME, f"# {shown(directory.name)}\n\n{NOTES}\n\n{text}\n{links}")
    return text


NOTES = """NELBO in nats per token over the full range of mask rates, the same rows and masks for every run. Difference:
paired by seed and row, with the 95 % interval of a bootstrap over both, and Holm's p over the arms of the table.
Tokens: until the NELBO is the final one of the reference with the same seed (median; range over seeds); "-": never.
Lowest, where a run has ended above it by more than its standard error: the median of the lowest NELBO, and of the
tokens there."""


def _section(point: str, arms: Sequence[ArmFigures]) -> str:
    """A table in Markdown."""
    columns = [
        "arm",
        "seeds",
        "final NELBO: median (range)",
        f"less {_cell(arms[0].name)} [95 %]",
        "p (Holm)",
        "tokens",
    ]
    lines = [_line(arm) for arm in arms]
    if any(run.has_overfitted for arm in arms for run in arm.runs):
        columns.append("lowest")
        lines = [f"{line} {_lowest(arm)} |" for line, arm in zip(lines, arms, strict=True)]
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*([f"## {shown(point)}", ""] if point else []), *head, *lines])


def _lowest(arm: ArmFigures) -> str:
    nelbo, tokens = (statistics.median(values) for values in zip(*(run.lowest for run in arm.runs), strict=True))
    return f"{nelbo:.4f} at {_millions(tokens)}"


def _cell(text: str) -> str:
    return shown(text).replace("|", r"\|")


def _line(arm: ArmFigures) -> str:
    final = sorted(run.nelbo[-1] for run in arm.runs)
    found, text = arm.difference, "| | "
    if found is not None and arm.p_holm is not None:
        text = f"| {found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}] | {arm.p_holm:.2g} "
    spread = _with_range(final, lambda nelbo: f"{nelbo:.4f}")
    return f"| {_cell(arm.name)} | {len(arm.runs)} | {spread} {text}| {_with_range(arm.tokens, _millions)} |"


def _with_range(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Median and range as texts, the range only where it is one."""
    if not values:
        return ""
    middle, low, high = (text(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:.2f}M" if math.isfinite(tokens) else "-"

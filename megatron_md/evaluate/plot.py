"""The metrics of a run as they were logged, and a picture of its losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_md import run_files
from megatron_md.errors import UserError
from megatron_md.files import replacing
from megatron_md.json_file import read_json
from megatron_md.messages import shown, tell
from megatron_md.train.records import damage, has_overfitted, is_number, lowest, read_lines

_LARGEST = 1e30  # beyond it matplotlib's ticks overflow


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of RUN/metrics.jsonl; damaged lines are told on stderr and left out.

    Raises:
        UserError: there is no such file, or it holds no record.
    """
    path = run_dir / run_files.METRICS
    if not path.is_file():
        raise UserError(f"{path}: no such file; is {run_dir} the directory of a run that has trained?")
    lines = read_lines(path)
    if problem := damage(path, lines):
        tell(f"megatron-md: {problem} and left out")
    records = [line.record for line in lines if line.record is not None]
    if not records:
        raise UserError(f"{path}: no step has been logged yet")
    return records


def series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Tokens and values of a metric, where it was logged, is finite, and no larger than a picture takes."""
    pairs = [(float(r["tokens"]), float(r[key])) for r in records if _has_numbers(r, "tokens", key)]
    return [tokens for tokens, _ in pairs], [value for _, value in pairs]


def _has_numbers(record: dict[str, Any], *keys: str) -> bool:
    return all(is_number(record.get(key)) and abs(record[key]) < _LARGEST for key in keys)


def plot_run(run_dir: Path, output: Path) -> None:
    """Draw training loss, masked cross-entropy and validation NELBO against tokens, all in nats per token.

    Only the validation NELBO compares across mask schedules, and with the unigram entropy (dashed; from
    RUN/summary.json, where it is recorded). Its minimum is marked where the run has ended above it by more than its
    standard error.

    Raises:
        UserError: the directory holds no metrics, or the picture's format is unknown.
    """
    records = read_metrics(run_dir)
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for key, label, color in (
        ("loss", "training objective", "#b8b8b8"),
        ("masked_ce", "cross-entropy at masked tokens (training)", "#4c78a8"),
    ):
        tokens, values = series(records, key)
        if values:
            axes.plot(tokens, values, label=label, color=color, linewidth=1.2)
    draw_validation(axes, records)
    entropy = _unigram_entropy(run_dir)
    if entropy is not None:
        axes.axhline(entropy, color="black", linestyle="--", linewidth=1.0, label=f"unigram entropy {entropy:.3f}")
    axes.set(xlabel="training tokens", ylabel="nats per token", title=plain(str(run_dir)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, output)


def draw_validation(
    axes: Any, records: Sequence[dict[str, Any]], *, name: str = "validation NELBO", color: Any = "#e4572e"
) -> None:
    """The validation NELBO with a band of one standard error, its minimum marked where the run has overfitted."""
    scored = [r for r in records if _has_numbers(r, "tokens", "val_nelbo")]
    if not scored:
        return
    tokens = [r["tokens"] for r in scored]
    values = [r["val_nelbo"] for r in scored]
    errors = [r["val_nelbo_stderr"] if _has_numbers(r, "val_nelbo_stderr") else 0.0 for r in scored]
    low = [value - error for value, error in zip(values, errors, strict=True)]
    high = [value + error for value, error in zip(values, errors, strict=True)]
    label = f"{name}, last {values[-1]:.3f} ± {errors[-1]:.3f}"
    axes.plot(tokens, values, color=color, marker="o" if len(values) <= 60 else "", markersize=4, lw=1.5, label=label)
    axes.fill_between(tokens, low, high, color=color, alpha=0.25, linewidth=0)
    best = lowest(scored)
    if best is not None and has_overfitted(scored):
        label = f"lowest {best['val_nelbo']:.3f}, at step {best['step']}: overfitted from there"
        axes.plot(best["tokens"], best["val_nelbo"], color="#8c1c13", marker="*", markersize=13, ls="", label=label)


def _unigram_entropy(run_dir: Path) -> float | None:
    try:
        value = read_json(run_dir / run_files.SUMMARY, "restore it").get("unigram_entropy")
    except ValueError:  # the line is left out; `inspect` says what is wrong with the file
        return None
    return float(value) if isinstance(value, (int, float)) else None


# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6914")


def arm_colors(count: int) -> list[Any]:
    """A colour for each arm of a sweep; where there are many, along a scale in their order."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    from matplotlib import colormaps

    scale = colormaps["turbo"]
    return [scale(0.03 + 0.94 * number / (count - 1)) for number in range(count)]


def plain(text: str) -> str:
    """A foreign text for a picture, in which matplotlib finds no formula."""
    return shown(text).replace("$", r"\$")


def picture_format(output: Path) -> str:
    """The picture format that a file's name asks for.

    Raises:
        UserError: it is none that can be drawn.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kind = output.suffix.removeprefix(".").lower()
    if kind not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"{output}: no picture format {kind!r}; use .png, .svg or .pdf")
    return kind


def save_figure(figure: Any, output: Path) -> None:
    """Write the picture under another name first: nobody sees half of one."""
    kind = picture_format(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        figure.savefig(temporary, format=kind, dpi=150)

"""`megatron-md evaluate RUN --nelbo DATA`: a bound on the likelihood, with its error."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_md.data.tokenizer import Tokenizer
from megatron_md.errors import UserError
from megatron_md.files import replace_file
from megatron_md.json_file import LARGE, as_record, read_json
from megatron_md.messages import redacted, say, shown
from megatron_md.run.saved import SavedRun, open_asked

if TYPE_CHECKING:
    from megatron_md.diffusion.nelbo import NelboReport, NelboTable
    from megatron_md.diffusion.scoring import ScoredRows
    from megatron_md.parallel import World
    from megatron_md.run.saved import SavedRun

ROWS = 256  # scored unless told otherwise


def evaluate_likelihood(args: argparse.Namespace) -> dict[str, Any] | None:
    """Evaluate and print; the figures on the main rank, None elsewhere.

    Raises:
        UserError: bad input, with the way out.
    """
    _check(args)
    runs = [open_asked(path, args) for path in (args.run_path, args.against) if path is not None]

    from megatron_md import parallel
    from megatron_md.diffusion.nelbo import check_passes, difference
    from megatron_md.evaluate.rows import TextFiles, evaluation_rows

    check_passes(args.passes, args.stderr, args.max_passes)
    tokenizers = [Tokenizer(saved.tokenizer) for saved in runs]
    if len({tokenizer.sha256 for tokenizer in tokenizers}) > 1:
        raise UserError(f"{args.against}: has another tokenizer than {args.run_path}, so that tokens do not compare")
    files = TextFiles(detokenizer=args.detokenizer, lines=args.lines, words=args.words)
    rows = evaluation_rows(args.nelbo, [saved.config for saved in runs], tokenizers[0], count=_count(args), files=files)
    with parallel.session(runs[0].config) as world:
        tables = [
            _table(saved, tokenizer, world, rows, args, args.state if number == 0 else None)
            for number, (saved, tokenizer) in enumerate(zip(runs, tokenizers, strict=True))
        ]
        if not world.is_main:
            return None
        result: dict[str, Any] = _figures(runs[0], tables[0], args)
        if len(tables) == 2:
            result["against"] = _figures(runs[1], tables[1], args)
            result["difference"] = asdict(difference(*tables))
        _print(result)
        if args.plot:
            plot_ce_by_rate(
                {str(saved.checkpoint): table.report() for saved, table in zip(runs, tables, strict=True)}, args.plot
            )
    return result


def _count(args: argparse.Namespace) -> int:
    """Most rows: perplexity per word needs whole files."""
    if args.rows is not None:
        return int(args.rows)
    return sys.maxsize if args.words else ROWS


def _check(args: argparse.Namespace) -> None:
    if args.plot is not None:
        from megatron_md.evaluate.plot import picture_format

        picture_format(args.plot)
    if args.state is not None and args.against is not None:
        raise UserError("--state keeps one run's table; leave out --against")


def _table(
    saved: SavedRun,
    tokenizer: Tokenizer,
    world: World,
    rows: ScoredRows,
    args: argparse.Namespace,
    state: Path | None,
) -> NelboTable:
    from megatron_md.diffusion.estimators import Estimator, EstimatorName
    from megatron_md.diffusion.nelbo import evaluate_nelbo
    from megatron_md.evaluate.load import load_model

    config = replace(saved.config, train=replace(saved.config.train, micro_batch_size=args.micro_batch_size))
    scorer = load_model(replace(saved, config=config), world, tokenizer)
    name: EstimatorName = "autoregressive" if scorer.causal else args.estimator
    estimator = Estimator(name, seed=args.seed, right_shift=scorer.causal and scorer.right_shift)
    with _progress(world.is_main, f"{saved.checkpoint}") as moved:

        def on_progress(table: NelboTable) -> None:
            moved(table)
            if state is not None and world.is_main:
                replace_file(state, json.dumps(table.state()))

        return evaluate_nelbo(
            scorer,
            rows,
            estimator,
            mask_token_id=tokenizer.mask_token_id,
            passes=1 if scorer.causal else args.passes,
            stderr=args.stderr,
            max_passes=args.max_passes,
            state=_read_state(state),
            on_progress=on_progress,
        )


@dataclass(frozen=True)
class _State:
    """What `--state` holds: `NelboTable.state()` and more."""

    rows: str
    estimator: dict[str, Any]
    passes: list[list[list[float | None]]]


def _read_state(path: Path | None) -> dict[str, Any] | None:
    if path is None or not path.exists():
        return None
    way_out = "not the state of an evaluation: remove it to start anew"
    return vars(as_record(_State, read_json(path, way_out, most_bytes=LARGE), path, way_out))


@contextmanager
def _progress(is_main: bool, text: str) -> Iterator[Callable[[NelboTable], None]]:
    """A bar over the rows of the current pass, on a terminal."""
    import numpy as np
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not (is_main and console.is_terminal)) as bar:
        text = escape(shown(text))
        task = bar.add_task(text)

        def moved(table: NelboTable) -> None:
            done = int(np.isfinite(table.sums[-1][0]).sum())
            bar.update(
                task, total=table.sums[-1].shape[1], completed=done, description=f"{text} pass {len(table.sums)}"
            )

        yield moved


def _figures(saved: SavedRun, table: NelboTable, args: argparse.Namespace) -> dict[str, Any]:
    report = table.report()
    head = {
        "run": str(saved.checkpoint),
        "step": saved.step,
        "data": redacted(args.nelbo),
        "estimator": asdict(table.estimator),
    }
    return {**head, **asdict(report)}


def _print(result: dict[str, Any]) -> None:
    for figures in (result, result.get("against")):
        if figures is None:
            continue
        causal = figures["estimator"]["name"] == "autoregressive"
        bits = "" if figures["bits_per_byte"] is None else f", {figures['bits_per_byte']:.4f} bits per byte"
        name, bound = ("NLL", "") if causal else ("NELBO", "<= ")
        say(
            f"{figures['run']}: {name} {figures['nelbo']:.4f} +- {figures['stderr']:.4f} nats per token "
            f"(masks alone {figures['mask_stderr']:.4f}), perplexity {bound}{figures['ppl_bound']:.2f}{bits}"
        )
        say(
            f"  {figures['tokens']:,} tokens in {figures['rows']:,} rows, {figures['passes']} passes, "
            f"{figures['forward_passes']:,} masked rows through the model, estimator {figures['estimator']['name']}"
        )
        if figures["word_ppl"] is not None:
            say(f"  perplexity per word {bound}{figures['word_ppl']:.2f} ({figures['words']:,} words as in the files)")
    if "difference" in result:
        gap = result["difference"]
        say(
            f"difference {gap['difference']:+.4f} +- {gap['stderr']:.4f} nats per token "
            f"(negative: {result['run']} is better)"
        )


def plot_ce_by_rate(reports: dict[str, NelboReport], output: Path) -> None:
    """Draw each model's cross-entropy per masked token by the mask rate, with error bars of one standard error.

    Raises:
        UserError: the picture's format is unknown.
    """
    from matplotlib.figure import Figure

    from megatron_md.evaluate.plot import plain, save_figure

    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for color, (name, report) in zip(("#e4572e", "#4c78a8"), reports.items(), strict=False):
        points = report.ce_by_rate
        axes.errorbar(
            [point.rate for point in points],
            [point.ce for point in points],
            yerr=[0.0 if math.isnan(point.stderr) else point.stderr for point in points],
            label=f"{plain(name)}: {report.nelbo:.3f} ± {report.stderr:.3f}",
            color=color,
            marker="o",
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )
    axes.set(xlabel="mask rate t", ylabel="nats per masked token", xlim=(0.0, 1.0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="NELBO (the area under the curve)")
    save_figure(figure, output)

"""`megatron-md evaluate RUN --nelbo DATA`: a bound on the likelihood, with its error."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_md.arguments import add_model_arguments, positive
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.files import replace_file

if TYPE_CHECKING:
    from megatron_md.evaluate.load import SavedRun
    from megatron_md.evaluate.nelbo import EvaluationRows, NelboReport, NelboTable
    from megatron_md.parallel import World

EXAMPLES = """examples:
  megatron-md evaluate runs/demo --nelbo corpus/valid
  megatron-md evaluate runs/demo --nelbo corpus/valid --stderr 0.01 --json demo.json --plot ce_by_rate.png
  megatron-md evaluate runs/window --nelbo corpus/valid --against runs/uniform
  torchrun --nproc-per-node 2 -m megatron_md evaluate runs/demo --nelbo README.md       (tensor-parallel)

A causal run gets its exact cross-entropy by the same command.
"""

ESTIMATORS = ("exact", "complementary", "stratified_t", "plain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--nelbo", nargs="+", required=True, metavar="DATA", help="a manifest, or text files")
    parser.add_argument("--rows", type=positive, default=256, metavar="N", help="most rows to score (256)")
    parser.add_argument("--estimator", choices=ESTIMATORS, default="complementary", help="which positions are masked")
    parser.add_argument("--passes", type=int, default=2, metavar="N", help="least passes with new masks (2)")
    parser.add_argument(
        "--stderr", type=float, metavar="NATS", help="go on until the masks' part of the error is below"
    )
    parser.add_argument("--max-passes", type=int, default=100, metavar="N", help="but make at most so many (100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the masks (0)")
    parser.add_argument("--against", metavar="RUN_B", help="compare with another run on the same rows and masks")
    parser.add_argument("--micro-batch-size", type=positive, default=8, metavar="N", help="rows per forward pass (8)")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep what is found, and go on from it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the cross-entropy by mask rate (.png, .svg, .pdf)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, print, and write what was asked for.

    Raises:
        ValueError: bad input, with the way out.
    """
    _check(args)
    from megatron_md import parallel
    from megatron_md.evaluate.load import open_run
    from megatron_md.evaluate.nelbo import difference
    from megatron_md.evaluate.rows import evaluation_rows
    from megatron_md.train.metrics import write_json

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    runs = [
        open_run(path, world_size=world_size, device=args.device, trust=args.trust)
        for path in (args.run_path, args.against)
        if path is not None
    ]
    tokenizers = [Tokenizer(saved.tokenizer) for saved in runs]
    if len({tokenizer.sha256 for tokenizer in tokenizers}) > 1:
        raise ValueError(f"{args.against}: has another tokenizer than {args.run_path}, so that tokens do not compare")
    rows = evaluation_rows(args.nelbo, [saved.config for saved in runs], tokenizers[0], count=args.rows)
    with parallel.session(runs[0].config) as world:
        tables = [
            _table(saved, tokenizer, world, rows, args, args.state if number == 0 else None)
            for number, (saved, tokenizer) in enumerate(zip(runs, tokenizers, strict=True))
        ]
        if world.is_main:
            result: dict[str, Any] = _figures(runs[0], tables[0], args)
            if len(tables) == 2:
                result["against"] = _figures(runs[1], tables[1], args)
                result["difference"] = asdict(difference(*tables))
            _print(result)
            if args.json:
                write_json(args.json, result)
            if args.plot:
                plot_ce_by_rate(
                    {str(saved.checkpoint): table.report() for saved, table in zip(runs, tables, strict=True)},
                    args.plot,
                )
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.plot is not None:
        from megatron_md.evaluate.plot import picture_format

        picture_format(args.plot)
    if args.state is not None and args.against is not None:
        raise ValueError("--state keeps one run's table; leave out --against")
    for path in (args.json, args.plot, args.state):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: the folder {path.parent} does not exist")


def _table(
    saved: SavedRun,
    tokenizer: Tokenizer,
    world: World,
    rows: EvaluationRows,
    args: argparse.Namespace,
    state: Path | None,
) -> NelboTable:
    from megatron_md.diffusion.estimators import Estimator, EstimatorName
    from megatron_md.evaluate.load import load_scorer
    from megatron_md.evaluate.nelbo import evaluate_nelbo

    config = replace(saved.config, train=replace(saved.config.train, micro_batch_size=args.micro_batch_size))
    scorer = load_scorer(replace(saved, config=config), world, tokenizer)
    name: EstimatorName = "autoregressive" if scorer.causal else args.estimator
    estimator = Estimator(name, seed=args.seed, right_shift=scorer.causal and config.objective.right_shift)
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


def _read_state(path: Path | None) -> dict[str, Any] | None:
    if path is None or not path.is_file():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        return {key: state[key] for key in ("rows", "estimator", "passes")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the state of an evaluation ({error}); remove it to start anew") from None


@contextmanager
def _progress(is_main: bool, text: str) -> Iterator[Callable[[NelboTable], None]]:
    """A bar over the rows of the current pass, on a terminal."""
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not (is_main and console.is_terminal)) as bar:
        task = bar.add_task(text)

        def moved(table: NelboTable) -> None:
            done = int(np.isfinite(table.sums[-1][0]).sum())
            bar.update(
                task, total=table.sums[-1].shape[1], completed=done, description=f"{text} pass {len(table.sums)}"
            )

        yield moved


def _figures(saved: SavedRun, table: NelboTable, args: argparse.Namespace) -> dict[str, Any]:
    report = table.report()
    head = {"run": str(saved.checkpoint), "step": saved.step, "data": args.nelbo, "estimator": asdict(table.estimator)}
    return {**head, **asdict(report)}


def _print(result: dict[str, Any]) -> None:
    for figures in (result, result.get("against")):
        if figures is None:
            continue
        causal = figures["estimator"]["name"] == "autoregressive"
        bits = "" if figures["bits_per_byte"] is None else f", {figures['bits_per_byte']:.4f} bits per byte"
        name, bound = ("NLL", "") if causal else ("NELBO", "<= ")
        print(
            f"{figures['run']}: {name} {figures['nelbo']:.4f} +- {figures['stderr']:.4f} nats per token "
            f"(masks alone {figures['mask_stderr']:.4f}), perplexity {bound}{figures['ppl_bound']:.2f}{bits}"
        )
        print(
            f"  {figures['tokens']:,} tokens in {figures['rows']:,} rows, {figures['passes']} passes, "
            f"{figures['forward_passes']:,} masked rows through the model, estimator {figures['estimator']['name']}"
        )
    if "difference" in result:
        gap = result["difference"]
        print(
            f"difference {gap['difference']:+.4f} +- {gap['stderr']:.4f} nats per token "
            f"(negative: {result['run']} is better)"
        )


def plot_ce_by_rate(reports: dict[str, NelboReport], output: Path) -> None:
    """Draw each model's cross-entropy per masked token by the mask rate, with error bars of one standard error.

    Raises:
        ValueError: the picture's format is unknown.
    """
    from matplotlib.figure import Figure

    from megatron_md.evaluate.plot import save_figure

    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for color, (name, report) in zip(("#e4572e", "#4c78a8"), reports.items(), strict=False):
        points = report.ce_by_rate
        axes.errorbar(
            [point.rate for point in points],
            [point.ce for point in points],
            yerr=[0.0 if math.isnan(point.stderr) else point.stderr for point in points],
            label=f"{name}: {report.nelbo:.3f} ± {report.stderr:.3f}",
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

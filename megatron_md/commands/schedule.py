"""`megatron-md schedule fit RUN`: a mask schedule from a pilot's gradients, as knots for the config and a picture."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_md.commands.arguments import check_folder_of, positive
from megatron_md.errors import UserError
from megatron_md.files import replace_file
from megatron_md.messages import progress, say, shown

if TYPE_CHECKING:
    from megatron_md.evaluate.gradients import ByRate
    from megatron_md.run.saved import SavedRun

MOST_NGRAM_TOKENS = 5_000_000
DIFFUSION = ("masked_diffusion", "masked_diffusion_sft")

EXAMPLES = """examples:
  megatron-md schedule fit runs/pilot
  megatron-md schedule fit runs/pilot --rows 1024 --output fitted.knots --json fit.json
  megatron-md schedule fit runs/pilot --checkpoints 100 200 --data corpus/valid

RUN is a short run with mask_schedule uniform:0,1. Held-out rows are masked at rates in each of 16 bins; the gradients
of their loss, scaled as AdamW would scale them, say where there is signal and where there is noise. Written are
  fitted.knots            to train with, weight elbo, and U[0, 1] in the end:
                          {name: anneal, from: "knots:fitted.knots", to: "uniform:0,1", over: [0.7, 1]}
  fitted.variance.knots   the full range with the least noise: mask_schedule "knots:...", importance: true
  fitted.png              both, what each bin is worth, and the window that `megatron-md window` predicts
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the action and its arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    raw, text = argparse.RawDescriptionHelpFormatter, "fit a mask schedule to a pilot run"
    fit = actions.add_parser("fit", help=text, description=text, epilog=EXAMPLES, formatter_class=raw)
    fit.add_argument("run_path", metavar="RUN", type=Path, help="run directory or checkpoint of a pilot")
    fit.add_argument(
        "--checkpoints",
        type=positive,
        nargs="+",
        metavar="STEP",
        help="checkpoints of RUN to average over (the newest)",
    )
    fit.add_argument("--data", metavar="FILE", help="held-out corpus, or a text file (the run's data.valid)")
    fit.add_argument("--rows", type=positive, default=512, metavar="N", help="held-out rows (%(default)s)")
    fit.add_argument("--group", type=positive, default=8, metavar="N", help="rows of a gradient (%(default)s)")
    fit.add_argument("--seed", type=int, default=0, metavar="N", help="of the masks (%(default)s)")
    fit.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    fit.add_argument("--trust", action="store_true", help="load a checkpoint that has no manifest")
    fit.add_argument("--output", type=Path, default=Path("fitted.knots"), metavar="FILE", help="knots (%(default)s)")
    fit.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")


def run(args: argparse.Namespace) -> int:
    """Fit, print, and write the files.

    Raises:
        UserError: bad input, with the way out.
    """
    for path in (args.output, args.json):
        check_folder_of(path)
    if args.output.suffix == ".png":
        raise UserError(f"--output {args.output}: ends with .png, as its picture does: name the file of knots")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("schedule fit works in one process: start it without torchrun, on a pilot that fits one device")
    start = time.perf_counter()
    runs = [_opened(path, args) for path in _paths(args)]
    data = args.data or runs[0].config.data.valid
    if data is None:
        raise UserError(f"{args.run_path}: has no data.valid: name held-out data with --data")
    figures = _fit(runs, str(data), args)
    window = _ngram_window(runs[0])
    _write(figures, window, args)
    say(_report(figures, window), multiline=True)
    say("")
    written = [args.output, *_beside(args.output), *([args.json] if args.json else [])]
    say(f"{', '.join(map(str, written))} written; {time.perf_counter() - start:.1f} s")
    return 0


def _paths(args: argparse.Namespace) -> list[Path]:
    from megatron_md import run_files
    from megatron_md.checkpoint.directory import checkpoint_name

    if args.checkpoints is None:
        return [args.run_path]
    return [args.run_path / run_files.CHECKPOINTS / checkpoint_name(step) for step in args.checkpoints]


def _opened(path: Path, args: argparse.Namespace) -> SavedRun:
    """What can be refused before torch is imported."""
    from megatron_md.run.saved import Placement, open_run

    saved = open_run(path, Placement(device=args.device, trust=args.trust))
    keys = saved.config.objective
    if keys.name not in DIFFUSION:
        raise UserError(
            f"{path}: objective.name {keys.name} has no mask schedule to fit; it takes {', '.join(DIFFUSION)}"
        )
    if saved.config.lora is not None:
        raise UserError(f"{path}: trains adapters, of which no schedule is fitted: take a run of whole weights")
    return saved


def _fit(runs: list[SavedRun], data: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as JSON holds them."""
    from megatron_md import parallel
    from megatron_md.data.tokenizer import Tokenizer
    from megatron_md.diffusion.fit import BINS, LEAST_GROUPS
    from megatron_md.evaluate.fitting import figures_of
    from megatron_md.evaluate.gradients import gradients_by_rate
    from megatron_md.evaluate.rows import TextFiles, evaluation_rows

    tokenizer, config = Tokenizer(runs[0].tokenizer), runs[0].config
    rows = evaluation_rows([data], [config], tokenizer, count=args.rows, files=TextFiles())
    groups, group = len(rows.tokens_RL) // args.group, args.group
    if groups < LEAST_GROUPS:
        raise UserError(
            f"{data}: has {len(rows.tokens_RL)} rows (--rows {args.rows}); {LEAST_GROUPS} groups of --group {group} "
            "rows are needed"
        )
    found: list[ByRate] = []
    with parallel.session(config) as world, progress("gradients", transient=True, lines=True) as move:
        whole, count = len(runs) * groups * BINS, itertools.count(1)

        def advance() -> None:
            done = next(count)
            move(completed=done, total=whole, text=f"{done} of {whole} gradients")

        for saved in runs:
            found.append(gradients_by_rate(saved, world, tokenizer, rows, group=group, seed=args.seed, advance=advance))
    return {"run": str(args.run_path), "data": data, "rows": groups * group, **figures_of(found, group)}


def _ngram_window(saved: SavedRun) -> tuple[float, float] | None:
    """The window that the training corpus' n-grams predict; None where the corpus is not at hand or too small."""
    from megatron_md.commands.window import predict
    from megatron_md.data.shards import load_manifest

    try:
        manifests = [load_manifest(corpus.manifest) for corpus in saved.config.data.corpora()]
        tokens = min(MOST_NGRAM_TOKENS, sum(manifest.tokens for manifest in manifests))
        predictions = predict(manifests, tokens) if tokens else []
    except UserError:
        return None
    return predictions[-1].window if predictions else None


def _beside(output: Path) -> tuple[Path, Path]:
    """The variance-optimal knots and the picture."""
    return output.with_suffix(f".variance{output.suffix}"), output.with_suffix(".png")


def _write(figures: dict[str, Any], window: tuple[float, float] | None, args: argparse.Namespace) -> None:
    from megatron_md.evaluate.fit_plot import plot_fit

    variance, picture = _beside(args.output)
    for path, name in ((args.output, "aligned"), (variance, "variance")):
        head = f"# t and its {name} density, fitted to {shown(figures['run'])}, steps {figures['steps']}\n"
        lines = (f"{t:.6g} {density:.6g}\n" for t, density in figures["densities"][name]["knots"])
        replace_file(path, head + "".join(lines))
    plot_fit(figures, window, picture)
    if args.json is not None:
        replace_file(args.json, json.dumps({**figures, "ngram_window": window}, indent=1) + "\n")


def _report(figures: dict[str, Any], window: tuple[float, float] | None) -> str:
    lines = [
        f"{figures['run']}, step {', '.join(map(str, figures['steps']))}: {figures['rows']} rows of {figures['data']}",
        "",
        f"{'mask rate':>16} {'loss':>8} {'its std':>8} {'signal':>10} {'+-':>8} {'v':>10} {'worth':>7} {'+-':>5}"
        f" {'aligned':>8} {'variance':>8}",
    ]
    edges = figures["edges"]
    columns = zip(
        *(figures[key] for key in ("loss", "loss_std", "signal", "signal_stderr", "moment")),
        *(figures[key] for key in ("window_gain", "window_gain_stderr")),
        *(figures["densities"][name]["bins"] for name in ("aligned", "variance")),
        strict=True,
    )
    for low, high, (loss, std, signal, error, moment, gain, gain_error, *densities) in zip(
        edges, edges[1:], columns, strict=False
    ):
        lines.append(
            f"{f'[{low:.4g}, {high:.4g}]':>16} {loss:8.3f} {std:8.3f} {signal:10.3g} {error:8.2g} {moment:10.3g}"
            f" {gain:7.2f} {gain_error:5.2f} {densities[0]:8.2f} {densities[1]:8.2f}"
        )
    lines += [
        "",
        "worth: rows of U[0, 1] for one row of a window in this bin; of the densities, on rows not fitted to:",
    ]
    for name, found in figures["densities"].items():
        lines.append(f"  {name:<9} {found['gain']:.2f} +- {found['gain_stderr']:.2f}")
    predicted = "not at hand" if window is None else f"[{window[0]:g}, {window[1]:g}]"
    return "\n".join([*lines, f"  the corpus' n-grams predict the window {predicted}"])

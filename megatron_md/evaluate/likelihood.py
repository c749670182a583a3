"""A bound on the likelihood of a run, or of several on the same rows and masks, with its error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_md import parallel
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.estimators import Estimator, EstimatorName
from megatron_md.diffusion.nelbo import NelboReport, NelboTable, check_passes, evaluate_nelbo
from megatron_md.diffusion.scoring import ScoredRows
from megatron_md.errors import UserError
from megatron_md.evaluate.load import load_model
from megatron_md.evaluate.plot import plain, save_figure
from megatron_md.evaluate.rows import TextFiles, evaluation_rows
from megatron_md.files import replace_file
from megatron_md.json_file import LARGE, as_record, read_json
from megatron_md.messages import progress
from megatron_md.parallel import World
from megatron_md.run.saved import SavedRun

ROWS = 256  # scored unless told otherwise


@dataclass(frozen=True)
class LikelihoodOptions:
    """What is scored, and how long.

    Attributes:
        rows: most rows; 256 if None, all of them where words are counted.
        files: how text files are read.
        estimator: which positions are masked; a causal run is scored exactly whatever it says, a block model by the
            exact count of each block.
        seed: of the masks.
        passes: least passes with new masks.
        stderr: go on until the masks' part of the standard error is at most this, in nats per token.
        max_passes: but make at most so many.
        micro_batch_size: rows per forward pass.
        state: file that keeps what is found, and from which a second call goes on; of a single run.
    """

    rows: int | None = None
    files: TextFiles = field(default_factory=TextFiles)
    estimator: EstimatorName = "complementary"
    seed: int = 0
    passes: int = 2
    stderr: float | None = None
    max_passes: int = 100
    micro_batch_size: int = 8
    state: Path | None = None


def likelihoods(runs: Sequence[SavedRun], data: Sequence[str], options: LikelihoodOptions) -> list[NelboTable]:
    """Score rows of data by each run; every rank calls this and gets the same tables.

    Args:
        runs: opened for this job, with the same tokenizer.
        data: a manifest, or text files.
        options: how.

    Raises:
        UserError: bad input, with the way out.
    """
    if options.state is not None and len(runs) > 1:
        raise UserError("--state keeps one run's table; leave out --against")
    check_passes(options.passes, options.stderr, options.max_passes)
    tokenizers = [Tokenizer(saved.tokenizer) for saved in runs]
    for saved, tokenizer in zip(runs, tokenizers, strict=True):
        if tokenizer.sha256 != tokenizers[0].sha256:
            raise UserError(f"{saved.path}: has another tokenizer than {runs[0].path}, so that tokens do not compare")
    count = options.rows or (sys.maxsize if options.files.words else ROWS)
    configs = [saved.config for saved in runs]
    rows = evaluation_rows(data, configs, tokenizers[0], count=count, files=options.files)
    with parallel.session(configs[0]) as world:
        return [_table(*pair, world, rows, options) for pair in zip(runs, tokenizers, strict=True)]


def _table(
    saved: SavedRun, tokenizer: Tokenizer, world: World, rows: ScoredRows, options: LikelihoodOptions
) -> NelboTable:
    train = replace(saved.config.train, micro_batch_size=options.micro_batch_size)
    scorer = load_model(replace(saved, config=replace(saved.config, train=train)), world, tokenizer)
    name: EstimatorName = "autoregressive" if scorer.causal else "exact" if scorer.block_size else options.estimator
    is_shifted = scorer.causal and scorer.right_shift
    estimator = Estimator(name, seed=options.seed, right_shift=is_shifted, block_size=scorer.block_size)
    text = saved.label
    with progress(text, visible=world.is_main) as move:

        def on_progress(table: NelboTable) -> None:
            sums_R = table.sums[-1][0]
            done = int(np.isfinite(sums_R).sum())
            move(completed=done, total=len(sums_R), text=f"{text} pass {len(table.sums)}")
            if options.state is not None and world.is_main:
                replace_file(options.state, json.dumps(table.state()))

        return evaluate_nelbo(
            scorer,
            rows,
            estimator,
            mask_token_id=tokenizer.mask_token_id,
            passes=1 if scorer.causal else options.passes,
            stderr=options.stderr,
            max_passes=options.max_passes,
            state=_read_state(options.state),
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


def plot_ce_by_rate(reports: dict[str, NelboReport], output: Path) -> None:
    """Draw each model's cross-entropy per masked token by the mask rate, with error bars of one standard error.

    Raises:
        UserError: the picture's format is unknown.
    """
    from matplotlib.figure import Figure

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

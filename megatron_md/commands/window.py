"""`megatron-md window`: which mask rates a corpus' n-grams ask for, as a line for the config and a picture."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from megatron_md.data.shards import Manifest, ShardReader, load_manifest
from megatron_md.diffusion.ngrams import MIN_COUNT, By, NgramCounter, OrderCounts, Tokens, weights_of, weights_stderr
from megatron_md.diffusion.theory import ngram_signal, optimal_mask_rate
from megatron_md.errors import UserError
from megatron_md.evaluate.plot import picture_format, plain, save_figure
from megatron_md.files import replace_file
from megatron_md.messages import progress, say, shown

WIDTH = 0.1
GENERATION = (0.5, 1.0)
# The recommendation goes by occurrences: they move less with the size of the corpus.
RECOMMEND_BY: By = "occurrences"
POWERS = {"linear": 1, "squared": 2}
PORTIONS = (1 / 8, 1 / 4, 1 / 2, 1.0)
SEED = 0

WHY_LIKELIHOOD = f"""t* is where masked tokens tell most about the corpus' recurring n-grams: the mean of the linear
and the squared prediction by occurrences, in a window of width {WIDTH} (that of the paper's pretraining runs). The
paper found likelihood and knowledge tasks best near the t* of its corpus, 0.46 to 0.48."""
WHY_GENERATION = """Generation starts from a canvas of masks only, so the denoiser must have seen rates up to 1; the
window above would leave them out. [0.5, 1] was the best for GSM8K and MATH in the paper's fine-tuning of LLaDA-8B
(0.785 and 0.375; [0.45, 0.55] reached 0.738 and 0.342). It was measured there, not derived from this corpus."""

EXAMPLES = """examples:
  megatron-md window corpus/train
  megatron-md window corpus/train --max-tokens 50000000 --output window.svg
  megatron-md window web/manifest.json books/manifest.json --json window.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("manifest", nargs="+", metavar="SHARDS", help="manifest.json or its folder")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read about a random N tokens' worth of documents")
    parser.add_argument(
        "--output", type=Path, default=Path("window.png"), metavar="FILE", help="picture to write (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")


@dataclass(frozen=True)
class Prediction:
    """What the n-grams of the tokens read so far say.

    Attributes:
        tokens: tokens read.
        counts: recurring n-grams of each order.
        weights: shares of the orders, of different n-grams (`types`) and of their `occurrences`.
        weights_stderr: standard errors of the shares, 0 where they are exact.
        mask_rate: t* for both, `linear` and `squared`.
    """

    tokens: int
    counts: dict[int, OrderCounts]
    weights: dict[By, dict[int, float]]
    weights_stderr: dict[By, dict[int, float]]
    mask_rate: dict[By, dict[str, float]]

    @classmethod
    def of(cls, tokens: int, counts: dict[int, OrderCounts]) -> Prediction:
        """The prediction from a counter's figures.

        Raises:
            UserError: no n-gram recurs.
        """
        weights = {by: weights_of(counts, by) for by in get_args(By)}
        return cls(
            tokens=tokens,
            counts=counts,
            weights=weights,
            weights_stderr={by: weights_stderr(counts, by) for by in get_args(By)},
            mask_rate={
                by: {name: optimal_mask_rate(weights[by], power) for name, power in POWERS.items()} for by in weights
            },
        )

    @property
    def window(self) -> tuple[float, float]:
        """The window for likelihood: WIDTH wide, about the mean of the predictions, edges in hundredths."""
        rates = self.mask_rate[RECOMMEND_BY].values()
        low = round(max(0.0, sum(rates) / len(rates) - WIDTH / 2), 2)
        return low, round(low + WIDTH, 2)


def run(args: argparse.Namespace) -> int:
    """Read the corpus, print figures and windows, draw the picture.

    Raises:
        UserError: bad input, or a corpus too small to have recurring n-grams.
    """
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens}: must be at least 1")
    picture_format(args.output)
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: the folder {args.json.parent} does not exist")
    manifests = [load_manifest(path) for path in args.manifest]
    first, *others = manifests
    for other in others:
        if other.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(f"{first.location} and {other.location} were tokenised with different tokenizers")
    name = shown(", ".join(manifest.location for manifest in manifests))
    available = sum(manifest.tokens for manifest in manifests)
    if not available:
        raise UserError(f"{name}: the corpus holds no tokens, only empty documents")
    start = time.perf_counter()
    tokens = min(args.max_tokens or available, available)
    predictions = predict(manifests, tokens)
    if not predictions:
        raise UserError(
            f"{name}: no n-gram recurs often enough in {tokens} tokens: take a larger corpus or --max-tokens"
        )
    draw(predictions, name, args.output)
    say(report(predictions, name), multiline=True)
    if args.json is not None:
        replace_file(args.json, json.dumps(report_json(predictions, name), indent=2) + "\n")
    written = f"{args.output}, {args.json}" if args.json is not None else args.output
    say("")
    say(f"{written} written; {time.perf_counter() - start:.1f} s")
    return 0


def predict(manifests: Sequence[Manifest], tokens: int) -> list[Prediction]:
    """The predictions after each of PORTIONS of that many tokens, without those that are too small for any."""
    counter = NgramCounter()
    predictions: list[Prediction] = []
    with progress("tokens", tokens, transient=True, lines=True) as move:

        def advance(done: int) -> None:
            move(completed=done, text=f"{done / 1e6:.2f}M of {tokens / 1e6:.2f}M tokens")

        reading = documents(manifests, tokens, advance)
        for portion in PORTIONS:
            before = counter.tokens
            counter.add(_until(portion * tokens - before, reading))
            counts = counter.counts()
            if counter.tokens > before and any(count.types for count in counts.values()):
                predictions.append(Prediction.of(counter.tokens, counts))
    return predictions


def documents(
    manifests: Sequence[Manifest], tokens: int, advance: Callable[[int], None] = lambda done: None
) -> Iterator[Tokens]:
    """Documents of corpora up to a number of tokens, the last one cut: shards, and within each the documents, shuffled.

    Args:
        manifests: the corpora.
        tokens: how many tokens to read.
        advance: told the tokens read so far after every document.

    Raises:
        ShardError: a document is damaged.
    """
    random = np.random.default_rng(SEED)
    shards = [(manifest, number) for manifest in manifests for number in range(len(manifest.shards))]
    done = 0
    for index in random.permutation(len(shards)):
        reader = ShardReader(*shards[index])
        for number in random.permutation(len(reader.index)):
            document = reader.document(number)[: tokens - done]
            yield document
            done += len(document)
            advance(done)
            if done == tokens:
                return


def _until(tokens: float, reading: Iterator[Tokens]) -> Iterator[Tokens]:
    """Pass documents on until there are that many tokens."""
    while tokens > 0:
        document = next(reading, None)
        if document is None:
            return
        yield document
        tokens -= len(document)


def report(predictions: Sequence[Prediction], name: str) -> str:
    """The figures as a table, then both windows."""
    last = predictions[-1]
    lines = [
        f"{name}: {last.tokens:,} tokens read; n-grams that occur at least {MIN_COUNT} times",
        "",
        f"  {'':<26}{'different n-grams':>24}{'their occurrences':>26}",
    ]
    for order, count in last.counts.items():
        text = "".join(f"{count.estimate(by)[0]:>16,.0f} {last.weights[by][order]:>9.4f}" for by in get_args(By))
        lines.append(f"  {f'{order}-grams':<24}{text}")
    if any(count.kept < 1.0 for count in last.counts.values()):
        worst = max(max(errors.values()) for errors in last.weights_stderr.values())
        kept = min(count.kept for count in last.counts.values())
        lines.append(
            f"  from a sample of the n-grams (down to 1 in {1 / kept:.0f}); standard error of a share <= {worst:.1g}"
        )
    lines.append("")
    for label in POWERS:
        for prediction in predictions:
            rates = [prediction.mask_rate[by][label] for by in get_args(By)]
            title = f"t* {label}, {prediction.tokens / 1e6:.2f}M tokens"
            lines.append(f"  {title:<34}{rates[0]:>16.3f}{rates[1]:>26.3f}")
    for use, (low, high), why in recommendations(last):
        lines += ["", f"{use}:", f"  {config_line(low, high)}", *(f"  {line}" for line in why.splitlines())]
    return "\n".join(lines)


def recommendations(prediction: Prediction) -> list[tuple[str, tuple[float, float], str]]:
    """(use, window, reason) of both uses."""
    return [
        ("likelihood and knowledge tasks", prediction.window, WHY_LIKELIHOOD),
        ("generation", GENERATION, WHY_GENERATION),
    ]


def config_line(low: float, high: float) -> str:
    """The line for a run's YAML file."""
    return f'objective: {{mask_schedule: "uniform:{low:g},{high:g}"}}'


def report_json(predictions: Sequence[Prediction], name: str) -> dict[str, Any]:
    """Every figure, for programs."""
    return {
        "corpus": name,
        "by_tokens": [asdict(prediction) for prediction in predictions],
        "recommended": {
            use: {"mask_schedule": f"uniform:{low:g},{high:g}", "why": " ".join(why.split())}
            for use, (low, high), why in recommendations(predictions[-1])
        },
    }


def draw(predictions: Sequence[Prediction], name: str, output: Path) -> None:
    """Draw Signal(t) with both windows shaded, and how t* moves with the size of the corpus.

    Raises:
        UserError: the picture's format is unknown.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(10.0, 4.6), layout="constrained")
    signal, sizes = figure.subplots(1, 2, width_ratios=[1.7, 1.0])
    last = predictions[-1]
    uses = zip(recommendations(last), ("#54a24b", "#b8b8b8"), strict=True)
    for (use, (low, high), _), color in uses:
        signal.axvspan(low, high, color=color, alpha=0.3, linewidth=0, label=f"{use}: [{low:g}, {high:g}]")
    t = np.linspace(0.0, 1.0, 501)
    colors = {"types": "#e4572e", "occurrences": "#4c78a8"}
    styles = {"linear": "-", "squared": "--"}
    for by, (label, power) in itertools.product(get_args(By), POWERS.items()):
        values, rate = ngram_signal(t, last.weights[by], power), last.mask_rate[by][label]
        style = {"color": colors[by], "linestyle": styles[label], "linewidth": 1.5}
        signal.plot(t, values / values.max(), label=f"{by}, {label}: t* = {rate:.3f}", **style)
        tokens = [prediction.tokens for prediction in predictions]
        rates = [prediction.mask_rate[by][label] for prediction in predictions]
        sizes.plot(tokens, rates, marker="o", markersize=4, label=f"{by}, {label}", **style)
    signal.set(xlabel="mask rate t", ylabel="Signal(t), largest = 1", xlim=(0, 1), ylim=(0, None), title=plain(name))
    sizes.set(xlabel="tokens read", ylabel="predicted mask rate t*", xscale="log")
    sizes.set_xticks([prediction.tokens for prediction in predictions])
    sizes.minorticks_off()
    sizes.xaxis.set_major_formatter(EngFormatter(places=1, sep=""))
    for axes in (signal, sizes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    signal.legend(frameon=False, fontsize=8, loc="lower center")
    save_figure(figure, output)

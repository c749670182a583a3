"""`megatron-md evaluate RUN`: likelihood, tasks of lm-evaluation-harness, or quality of samples; one mode a call."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_md.commands.arguments import add_model_arguments, check_folder_of, placement, positive
from megatron_md.diffusion.conditional import ConditionalMethod
from megatron_md.diffusion.estimators import EstimatorName
from megatron_md.errors import UserError
from megatron_md.evaluate.detokenize import RULES
from megatron_md.messages import redacted, say
from megatron_md.run.saved import SavedRun, open_run

if TYPE_CHECKING:
    from megatron_md.evaluate.generative import GenerativeReport, Quality, TextQuality

EXAMPLES = """examples:
  megatron-md evaluate runs/demo --nelbo corpus/valid
  megatron-md evaluate runs/demo --nelbo corpus/valid --stderr 0.01 --json demo.json --plot ce_by_rate.png
  megatron-md evaluate runs/window --nelbo corpus/valid --against runs/uniform
  megatron-md evaluate runs/tuned --nelbo corpus/valid --weights ema --against runs/tuned
  megatron-md evaluate runs/demo --nelbo wiki.test.tokens --detokenizer wikitext --words
  megatron-md evaluate runs/demo --tasks hellaswag,arc_easy --seeds 1,2,3 --json tasks.json
  megatron-md evaluate runs/demo --tasks gsm8k --length 512 --steps 512
  megatron-md evaluate runs/demo --generative --judge runs/ar --length 128 --steps 8,32,128 --temperatures 0.8,1
  torchrun --nproc-per-node 2 -m megatron_md evaluate runs/demo --nelbo README.md       (tensor-parallel)

A causal run gets its exact cross-entropy by the same command.
"""

# A causal run has its own, and `neyman` needs to know what spread to expect.
ESTIMATORS = [name for name in get_args(EstimatorName) if name not in ("autoregressive", "neyman")]
METHODS = [name for name in get_args(ConditionalMethod) if name != "autoregressive"]

# What an option is where it is not given, by mode. An option that a mode does not have is refused there.
DEFAULTS: dict[str, dict[str, Any]] = {
    "nelbo": {
        "rows": None, "estimator": "complementary", "passes": 2, "stderr": None, "max_passes": 100, "seed": 0,
        "against": None, "state": None, "plot": None, "detokenizer": None, "words": False, "lines": False,
    },
    "tasks": {
        "include_path": None, "num_fewshot": None, "limit": None, "seeds": None, "seed": 0, "method": "monte_carlo",
        "draws": 128, "unsafe_code": False, "length": None, "steps": None, "block": None, "strategy": "low_confidence",
        "temperatures": None, "guidance": 0.0,
    },
    "generative": {
        "judge": None, "samples": 64, "length": None, "steps": None, "block": None, "strategy": "ancestral",
        "temperatures": [1.0], "reference": None, "seed": 0,
    },
}  # fmt: skip


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A list of numbers, as in 8,16,32."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",") if part]

    parse.__name__ = "numbers"
    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    mode = parser.add_argument_group("what to evaluate (one of them)")
    mode.add_argument("--nelbo", nargs="+", metavar="DATA", help="likelihood on a manifest, or text files")
    mode.add_argument("--tasks", metavar="A,B", help="tasks of lm-evaluation-harness (pip install 'megatron-md[eval]')")
    mode.add_argument("--generative", action="store_true", help="perplexity of samples under a causal run, and entropy")
    parser.add_argument("--seed", type=int, help="seed of the masks and of sampling (0)")
    rows = "rows per forward pass (8)"
    parser.add_argument(
        "--micro-batch-size", "--batch-size", dest="micro_batch_size", type=positive, default=8, metavar="N", help=rows
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    _add_nelbo(parser.add_argument_group("--nelbo"))
    _add_tasks(parser.add_argument_group("--tasks"))
    _add_generation(parser.add_argument_group("--generative, and tasks that generate"))


def _add_nelbo(group: Any) -> None:
    group.add_argument("--rows", type=positive, metavar="N", help="most rows to score (256; all with --words)")
    group.add_argument("--estimator", choices=ESTIMATORS, help="which positions are masked (complementary)")
    group.add_argument("--passes", type=int, metavar="N", help="least passes with new masks (2)")
    group.add_argument("--stderr", type=float, metavar="NATS", help="go on until the masks' part of the error is below")
    group.add_argument("--max-passes", type=int, metavar="N", help="but make at most so many (100)")
    group.add_argument("--against", metavar="RUN_B", help="compare with another run on the same rows and masks")
    group.add_argument("--state", type=Path, metavar="FILE", help="keep what is found, and go on from it")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw cross-entropy by mask rate (.png, .svg, .pdf)")
    group.add_argument("--detokenizer", choices=sorted(RULES), help="undo the tokenisation that text files came with")
    group.add_argument("--words", action="store_true", default=None, help="also perplexity per word of the files")
    group.add_argument("--lines", action="store_true", default=None, help="each line of a file is a document")


def _add_tasks(group: Any) -> None:
    group.add_argument("--include-path", type=Path, metavar="DIR", help="folder with further tasks (YAML)")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt (the task's own)")
    group.add_argument("--limit", type=float, metavar="N", help="only the first N questions of each task, or a share")
    group.add_argument("--seeds", type=_numbers(int), metavar="1,2,3", help="several seeds: means, spread, flip rates")
    group.add_argument("--method", choices=METHODS, help="how answers are scored (monte_carlo)")
    group.add_argument("--draws", type=positive, metavar="N", help="masked copies of an answer (128)")
    group.add_argument(
        "--unsafe-code", action="store_true", default=None, help="run tasks that execute what the model writes"
    )


def _add_generation(group: Any) -> None:
    group.add_argument("--length", type=positive, metavar="N", help="tokens to generate (the task's; the run's row)")
    group.add_argument("--steps", type=_numbers(positive), metavar="8,16", help="denoising steps (one per token)")
    group.add_argument("--block", type=positive, metavar="N", help="tokens per block, filled left to right (all)")
    group.add_argument("--strategy", help="of the sampler (tasks: low_confidence, samples: ancestral)")
    group.add_argument(
        "--temperatures", "--temperature", type=_numbers(float), metavar="0.8,1", help="(the task's; samples: 1)"
    )
    group.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance of tasks that generate")
    group.add_argument("--judge", metavar="RUN_AR", help="the causal run that judges the samples")
    group.add_argument("--samples", type=positive, metavar="N", help="samples for each setting (64)")
    group.add_argument(
        "--reference", nargs="+", metavar="DATA", help="text to compare with (the run's data.valid, if it is there)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, print, and write what was asked for.

    Raises:
        UserError: bad input, with the way out.
    """
    mode = _settle(args)
    for path in (args.json, args.plot, args.state):
        check_folder_of(path)
    result = {"nelbo": _nelbo, "tasks": _tasks, "generative": _generative}[mode](args)
    if result is not None and args.json:
        from megatron_md.train.callbacks.metrics import write_json

        write_json(args.json, result)
    return 0


def _open(args: argparse.Namespace, *paths: str | None) -> list[SavedRun]:
    """Refuse what can be refused of runs before torch is imported."""
    where = placement(args)
    # --weights is said of RUN, whose average may be compared with its weights.
    others = replace(where, weights="model")
    return [open_run(path, others if number else where) for number, path in enumerate(paths) if path is not None]


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _nelbo(args: argparse.Namespace) -> dict[str, Any] | None:
    runs = _open(args, args.run_path, args.against)
    if args.plot is not None:
        from megatron_md.evaluate.plot import picture_format

        picture_format(args.plot)
    from megatron_md.diffusion.nelbo import difference
    from megatron_md.evaluate.likelihood import LikelihoodOptions, likelihoods, plot_ce_by_rate
    from megatron_md.evaluate.rows import TextFiles

    options = LikelihoodOptions(
        rows=args.rows,
        files=TextFiles(detokenizer=args.detokenizer, lines=args.lines, words=args.words),
        estimator=args.estimator,
        seed=args.seed,
        passes=args.passes,
        stderr=args.stderr,
        max_passes=args.max_passes,
        micro_batch_size=args.micro_batch_size,
        state=args.state,
    )
    tables = likelihoods(runs, args.nelbo, options)
    if not _is_main():
        return None
    reports = [table.report() for table in tables]
    figures: list[dict[str, Any]] = [
        {
            "run": saved.label,
            "step": saved.step,
            "data": redacted(args.nelbo),
            "estimator": asdict(table.estimator),
            **asdict(report),
        }
        for saved, table, report in zip(runs, tables, reports, strict=True)
    ]
    for one in figures:
        _print_likelihood(one)
    result = figures[0]
    if len(tables) == 2:
        result |= {"against": figures[1], "difference": asdict(difference(*tables))}
        say(
            f"difference {result['difference']['difference']:+.4f} +- {result['difference']['stderr']:.4f} nats per "
            f"token (negative: {result['run']} is better)"
        )
    if args.plot:
        plot_ce_by_rate({saved.label: report for saved, report in zip(runs, reports, strict=True)}, args.plot)
    return result


def _print_likelihood(figures: dict[str, Any]) -> None:
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


def _tasks(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.limit is not None and not args.limit > 0.0:
        raise UserError(f"--limit {args.limit:g}: must be positive, a number of questions or a share below 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num-fewshot {args.num_fewshot}: must be 0 at least")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {','.join(map(str, args.seeds))}: one is there twice")
    (saved,) = _open(args, args.run_path)
    from megatron_md.evaluate.tasks import HarnessSettings, TaskOptions, evaluate_tasks

    settings = HarnessSettings(
        method=args.method,
        draws=args.draws,
        length=args.length,
        steps=args.steps,
        block=args.block,
        strategy=args.strategy,
        temperature=args.temperature,
        guidance=args.guidance,
    )
    options = TaskOptions(
        names=[name for name in args.tasks.split(",") if name],
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        seeds=args.seeds,
        micro_batch_size=args.micro_batch_size,
        unsafe_code=args.unsafe_code,
        settings=settings,
    )
    result = evaluate_tasks(saved, options)
    if result is not None:
        _print_tasks(result)
    return result


def _print_tasks(result: dict[str, Any]) -> None:
    for task, figures in result["tasks"].items():
        for name, found in figures["metrics"].items():
            error = "" if found["stderr"] is None else f" +- {found['stderr']:.4g}"
            spread = (
                "" if found["spread"] is None else f"   spread over {len(found['seeds'])} seeds {found['spread']:.4g}"
            )
            say(f"{task:30s} {name:24s} {found['mean']:.6g}{error}{spread}")
        for name, flips in figures.get("flips", {}).items():
            say(
                f"{task:30s} {'flip rate,' + name:24s} {flips['flip_rate']:.4f}   {flips['changed']:.4f} of "
                f"{flips['questions']:,} questions not answered alike by all seeds"
            )
    shortened = f", {result['shortened_prompts']:,} prompts cut from the left" if result["shortened_prompts"] else ""
    say(f"{result['run']}: {result['forward_passes']:,} rows through the model in {result['seconds']:.1f} s{shortened}")


def _generative(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.judge is None:
        raise UserError("--generative needs --judge RUN_AR: a causal run, such as an autoregressive baseline")
    saved, judge = _open(args, args.run_path, args.judge)
    from megatron_md.evaluate.generative import GenerativeOptions, evaluate_generative

    options = GenerativeOptions(
        samples=args.samples,
        length=args.length,
        steps=args.steps or (),
        block=args.block,
        strategy=args.strategy,
        temperatures=args.temperatures,
        reference=args.reference or (),
        seed=args.seed,
        micro_batch_size=args.micro_batch_size,
    )
    report = evaluate_generative(saved, judge, options, on_progress=lambda report: _print_progress(report, args.judge))
    if report is None:
        return None
    for steps, value in report.perplexity_at_text_entropy.items():
        found = "no two temperatures lie around it" if value is None else f"perplexity {value:.2f}"
        say(f"at the text's entropy, {steps} steps: {found}")
    return asdict(report)


def _print_progress(report: GenerativeReport, judge: str) -> None:
    """The head of the table, or the newest line of it."""
    if report.settings:
        quality = report.settings[-1]
        head = f"{quality.temperature:>11g} {quality.steps:>7d} {quality.forward_passes:>15.1f}"
        say(f"{head} {_quality(quality)} {quality.seconds:>8.1f}")
        return
    say(f"{report.run}, {report.samples} samples of {report.length} tokens for each line, judged by {judge}")
    say(
        "temperature   steps  forward passes  perplexity (+- of its log)  entropy  distance: unigrams  bigrams  seconds"
    )
    if report.text is not None:
        say(f"{'text':>11s}{' ' * 24} {_quality(report.text)}")


def _quality(quality: Quality | TextQuality) -> str:
    return (
        f"{quality.perplexity:>11.2f} {quality.stderr:>14.4f} {quality.entropy:>9.3f} "
        f"{quality.unigram_distance:>19.3f} {quality.bigram_distance:>8.3f}"
    )


def _settle(args: argparse.Namespace) -> str:
    """The mode, after its options got their defaults.

    Raises:
        UserError: not exactly one mode, or an option of another one.
    """
    modes = [mode for mode in DEFAULTS if getattr(args, mode)]
    if len(modes) != 1:
        raise UserError("give one of --nelbo DATA, --tasks NAMES and --generative; see megatron-md evaluate --help")
    (mode,) = modes
    known = DEFAULTS[mode]
    for name in sorted({name for options in DEFAULTS.values() for name in options}):
        if getattr(args, name) is None:
            setattr(args, name, known.get(name))
        elif name not in known:
            owners = " or ".join(f"--{owner}" for owner, options in DEFAULTS.items() if name in options)
            raise UserError(f"--{name.replace('_', '-')} belongs to {owners}, not to --{mode}")
    if mode == "tasks":
        args.steps, args.temperature = _one(args.steps, "--steps"), _one(args.temperatures, "--temperature")
        args.seeds = args.seeds or [args.seed]
    return mode


def _one(values: list[Any] | None, name: str) -> Any:
    if values is not None and len(values) != 1:
        raise UserError(f"{name}: tasks take one value, not {len(values)}")
    return values[0] if values else None

"""`megatron-md evaluate RUN`: likelihood, tasks of lm-evaluation-harness, or quality of samples; one mode a call."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from megatron_md.commands.arguments import check_folder_of, placement
from megatron_md.commands.evaluate_options import add_arguments, settings_of, settle
from megatron_md.messages import redacted, say
from megatron_md.run.saved import SavedRun, open_run

if TYPE_CHECKING:
    from megatron_md.evaluate.generative import GenerativeReport, Quality, TextQuality

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """examples:
  megatron-md evaluate runs/demo --nelbo corpus/valid
  megatron-md evaluate runs/demo --nelbo corpus/valid --stderr 0.01 --json demo.json --plot ce_by_rate.png
  megatron-md evaluate runs/window --nelbo corpus/valid --against runs/uniform
  megatron-md evaluate runs/tuned --nelbo corpus/valid --weights ema --against runs/tuned
  megatron-md evaluate runs/demo --nelbo wiki.test.tokens --detokenizer wikitext --words
  megatron-md evaluate runs/demo --tasks hellaswag,arc_easy --seeds 1,2,3 --json tasks.json
  megatron-md evaluate runs/demo --tasks gsm8k --length 512 --steps 512 --state answers.jsonl
  megatron-md evaluate runs/sft --tasks gsm8k --apply-chat-template --fewshot-as-multiturn --length 512
  megatron-md evaluate runs/demo --generative --judge runs/ar --length 128 --steps 8,32,128 --temperatures 0.8,1
  torchrun --nproc-per-node 2 -m megatron_md evaluate runs/demo --nelbo README.md       # tensor-parallel

A causal run gets its exact cross-entropy by the same command.
"""


def run(args: argparse.Namespace) -> int:
    """Evaluate, print, and write what was asked for.

    Raises:
        UserError: bad input, with the way out.
    """
    mode = settle(args)
    for path in (args.json, args.plot, args.state):
        check_folder_of(path)
    # Refuse what can be refused of runs before torch is imported.
    where = placement(args)
    runs = {"run": open_run(args.run_path, where)}
    for part, path in {"against": args.against, "judge": args.judge}.items():
        if path is not None:  # --weights is said of RUN, whose average may be compared with its weights
            runs[part] = open_run(path, replace(where, weights="model"))
    result = {"nelbo": _nelbo, "tasks": _tasks, "generative": _generative}[mode](args, list(runs.values()))
    if result is not None and args.json:
        from megatron_md.evaluate.card import card, write_card
        from megatron_md.train.callbacks.metrics import write_json

        write_json(args.json, result)
        write_card(args.json, card(mode, runs, settings_of(args, mode), result))
    return 0


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _nelbo(args: argparse.Namespace, runs: list[SavedRun]) -> dict[str, Any] | None:
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


def _tasks(args: argparse.Namespace, runs: list[SavedRun]) -> dict[str, Any] | None:
    from megatron_md.evaluate.answer_settings import HarnessSettings
    from megatron_md.evaluate.tasks import TaskOptions, evaluate_tasks

    settings = HarnessSettings(
        method=args.method,
        draws=args.draws,
        length=args.length,
        steps=args.steps,
        block=args.block,
        strategy=args.strategy,
        temperature=args.temperature,
        guidance=args.guidance,
        logits_eos_inf=args.logits_eos_inf,
        confidence_eos_eot_inf=args.confidence_eos_eot_inf,
        template=args.template,
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
        chat=args.apply_chat_template,
        multiturn=args.fewshot_as_multiturn,
        state=args.state,
    )
    (saved,) = runs
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
        if "half_flips" in figures:
            flips = figures["half_flips"]
            say(
                f"{task:30s} {'flip rate,halves':24s} {flips['flip_rate']:.4f}   of {flips['questions']:,} choices, "
                "between the halves of the draws"
            )
        for name, flips in figures.get("flips", {}).items():
            say(
                f"{task:30s} {'flip rate,' + name:24s} {flips['flip_rate']:.4f}   {flips['changed']:.4f} of "
                f"{flips['questions']:,} questions not answered alike by all seeds"
            )
    shortened = f", {result['shortened_prompts']:,} prompts cut from the left" if result["shortened_prompts"] else ""
    say(f"{result['run']}: {result['forward_passes']:,} rows through the model in {result['seconds']:.1f} s{shortened}")


def _generative(args: argparse.Namespace, runs: list[SavedRun]) -> dict[str, Any] | None:
    saved, judge = runs
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

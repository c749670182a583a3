"""`megatron-md evaluate RUN --tasks a,b`: lm-evaluation-harness over some seeds, and how steady answers are."""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from megatron_md.data.optional import optional_package
from megatron_md.errors import UserError
from megatron_md.messages import say
from megatron_md.run.saved import open_asked

if TYPE_CHECKING:
    from megatron_md.evaluate.harness import HarnessSettings

Answers = dict[Any, Any]


@dataclass(frozen=True)
class FlipRate:
    """How often answers change with the seed.

    Attributes:
        flip_rate: chance that two different seeds answer a question differently: the share of questions that do, on
            average over the pairs of seeds.
        changed: share of questions that not all seeds answer alike (the same for two seeds).
        questions: how many were asked.
    """

    flip_rate: float
    changed: float
    questions: int


def flip_rate(answers: Sequence[Answers]) -> FlipRate:
    """Compare the answers of several seeds, each by the question's number.

    Raises:
        UserError: fewer than two seeds, or they answer different questions, or none.
    """
    if len(answers) < 2:
        raise UserError("a flip rate needs two seeds at least")
    questions = answers[0].keys()
    if not questions or any(given.keys() != questions for given in answers):
        raise UserError("the seeds have not answered the same questions, one at least")
    pairs = [fmean(one[q] != other[q] for q in questions) for one, other in combinations(answers, 2)]
    changed = fmean(any(given[q] != answers[0][q] for given in answers) for q in questions)
    return FlipRate(fmean(pairs), changed, len(questions))


def answers_of(samples: Sequence[Mapping[str, Any]]) -> dict[str, Answers]:
    """By the harness' filter, what was answered to each question of a task.

    The choice of highest log-likelihood; of a single continuation whether greedy decoding gives it; of generation the
    text after the filter. Whole texts have no answer.
    """
    found: dict[str, Answers] = {}
    for sample in samples:
        responses = sample["filtered_resps"]
        if isinstance(responses[0], (int, float)):
            continue
        if isinstance(responses[0], (tuple, list)) and len(responses[0]) == 2 and isinstance(responses[0][0], float):
            values = [value for value, _ in responses]
            answer: Any = values.index(max(values)) if len(values) > 1 else bool(responses[0][1])
        else:
            answer = responses[0]
        found.setdefault(sample["filter"], {})[sample["doc_id"]] = answer
    return found


def evaluate_tasks(args: argparse.Namespace) -> dict[str, Any] | None:
    """Run the tasks, once for each seed; the figures on the main rank, None elsewhere.

    Raises:
        UserError: bad input, with the way out.
    """
    _check(args)
    _quieten()
    saved = open_asked(args.run_path, args)
    optional_package("lm_eval", "--tasks", "eval")
    names = [name for name in args.tasks.split(",") if name]
    manager = _task_manager(names, args.include_path)
    tasks = _load_tasks(manager, names)
    from lm_eval.evaluator import simple_evaluate

    from megatron_md import parallel
    from megatron_md.evaluate.harness import HarnessModel

    settings = _settings(args)
    split = {key: getattr(args, key) for key in ("tensor", "pipeline", "device", "trust")}
    with parallel.session(saved.config) as world:
        model = HarnessModel(args.run_path, batch_size=args.micro_batch_size, world=world, **split, **asdict(settings))
        per_seed: dict[int, dict[str, Any]] = {}
        start = time.perf_counter()
        for seed in args.seeds:
            model.settings = replace(settings, seed=seed)
            with redirect_stdout(io.StringIO()):  # it prints on every rank
                found: Any = simple_evaluate(
                    model,
                    tasks=tasks,
                    task_manager=manager,
                    num_fewshot=args.num_fewshot,
                    limit=args.limit,
                    batch_size=args.micro_batch_size,
                    confirm_run_unsafe_code=args.unsafe_code,
                )
            if world.is_main:
                per_seed[seed] = found
        if not world.is_main:
            return None
        how = {**asdict(settings), **({"method": "autoregressive"} if model.causal else {})}
        del how["seed"]
        result = {
            "run": str(saved.checkpoint),
            "step": saved.step,
            "seeds": args.seeds,
            "settings": {**how, "num_fewshot": args.num_fewshot, "limit": args.limit},
            "tasks": summary(per_seed),
            "forward_passes": model.forward_passes,
            "shortened_prompts": model.shortened,
            "seconds": time.perf_counter() - start,
        }
    _print(result)
    return result


def _settings(args: argparse.Namespace) -> HarnessSettings:
    """How the model answers, without the seed."""
    from megatron_md.evaluate.harness import HarnessSettings

    return HarnessSettings(
        method=args.method,
        draws=args.draws,
        length=args.length,
        steps=args.steps,
        block=args.block,
        strategy=args.strategy or "low_confidence",
        temperature=args.temperature,
        guidance=args.guidance,
    )


def _quieten() -> None:
    """Before the harness is imported."""
    # The harness' own bars know nothing of ranks, and its bootstrap would fork a process that has threads.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("lm_eval").setLevel(logging.CRITICAL)


def _check(args: argparse.Namespace) -> None:
    if args.limit is not None and not args.limit > 0.0:
        raise UserError(f"--limit {args.limit:g}: must be positive, a number of questions or a share below 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num-fewshot {args.num_fewshot}: must be 0 at least")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {','.join(map(str, args.seeds))}: one is there twice")


def summary(per_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By task (and group): `metrics` under the harness' names, such as `acc,none` for metric and filter, and `flips`.

    A metric has its `mean` over seeds, the harness' standard error `stderr` over questions (of the first seed; None
    where it knows none), its value for each of the `seeds`, and their standard deviation `spread` (None of one seed).
    """
    first = next(iter(per_seed.values()))
    tasks: dict[str, dict[str, Any]] = {}
    for task, figures in first["results"].items():
        metrics = {}
        for name in figures:
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            values = [float(found["results"][task][name]) for found in per_seed.values()]
            stderr = figures.get(f"{metric}_stderr,{chosen}")
            metrics[name] = {
                "mean": fmean(values),
                "stderr": stderr if isinstance(stderr, (int, float)) else None,
                "seeds": values,
                "spread": stdev(values) if len(values) > 1 else None,
            }
        tasks[task] = {"metrics": metrics}
        if len(per_seed) > 1:
            leaves = _leaves(task, first.get("group_subtasks", {}), first["samples"])
            by_seed = [_answers(found["samples"], leaves) for found in per_seed.values()]
            flips = {name: asdict(flip_rate([answers[name] for answers in by_seed])) for name in by_seed[0]}
            tasks[task]["flips"] = flips
    return tasks


def _leaves(name: str, groups: Mapping[str, Sequence[str]], samples: Mapping[str, Any]) -> list[str]:
    """The tasks of a task or group."""
    if name in samples:
        return [name]
    return [leaf for child in groups.get(name, ()) for leaf in _leaves(child, groups, samples)]


def _answers(samples: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Answers]:
    """By filter, the answers to all questions of several tasks."""
    found: dict[str, Answers] = {}
    for task in tasks:
        for name, answers in answers_of(samples[task]).items():
            found.setdefault(name, {}).update({(task, question): answer for question, answer in answers.items()})
    return found


def _print(result: dict[str, Any]) -> None:
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


def _task_manager(names: Sequence[str], include_path: Path | None) -> Any:
    """The harness' index of tasks; its own 14,000 are left out where the folder has all that are asked for.

    Raises:
        UserError: no names, no such folder, or no such task.
    """
    if not names:
        raise UserError("--tasks: give names of tasks, such as arc_easy,hellaswag")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path}: no such folder")
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--tasks {name}: unknown to lm-eval{hint} (`lm-eval ls tasks` lists them)")
    return manager


def _load_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
    """The tasks with their data, which the harness may download.

    Raises:
        UserError: they cannot be had.
    """
    tasks: list[Any] = []
    leaves: set[str] = set()
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:
            line = next(iter(str(error).splitlines()), "")
            raise UserError(f"--tasks {name}: cannot be loaded ({type(error).__name__}: {line})") from error
        again = sorted(leaves & loaded["tasks"].keys())
        if again:
            raise UserError(f"--tasks {name}: {again[0]} is part of another one that is asked for; leave one out")
        leaves |= loaded["tasks"].keys()
        tasks += [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
    return tasks

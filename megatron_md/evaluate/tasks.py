"""A run's answers to tasks of lm-evaluation-harness, over some seeds, and how steady they are."""

from __future__ import annotations

import difflib
import io
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from megatron_md import parallel
from megatron_md.data.optional import optional_package
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.errors import UserError
from megatron_md.evaluate.answer_settings import HarnessSettings
from megatron_md.evaluate.dialogue import template_of
from megatron_md.run.saved import SavedRun

Answers = dict[Any, Any]
# By task, seed and question, and choice: log-likelihoods by the two halves of the draws.
Halves = Mapping[str, Mapping[tuple[int, Any], Mapping[int, tuple[float, float]]]]


@dataclass(frozen=True)
class TaskOptions:
    """What is asked, and how often.

    Attributes:
        names: of tasks or groups.
        include_path: folder with further tasks.
        num_fewshot: examples in the prompt; the task's own number if None.
        limit: only the first questions of each task, or a share below 1.
        seeds: of the masks and of sampling, one evaluation each.
        micro_batch_size: rows per forward pass.
        unsafe_code: run tasks that execute what the model writes.
        settings: how requests are answered, whatever their seed.
        chat: put questions to the run as its chat template says.
        multiturn: give the examples in the prompt as turns of the dialogue.
        state: file that keeps the answers as they come; a second call goes on from it.
    """

    names: Sequence[str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    seeds: Sequence[int] = (0,)
    micro_batch_size: int = 8
    unsafe_code: bool = False
    settings: HarnessSettings = field(default_factory=HarnessSettings)
    chat: bool = False
    multiturn: bool = False
    state: Path | None = None


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


def half_flips(halves: Halves, tasks: Sequence[str]) -> FlipRate | None:
    """How often one half of the draws chooses another answer than the other half; None without such questions.

    The answer is the choice of highest log-likelihood by one half. Half the draws are noisier than all of them, so that
    this is what to expect of two evaluations with half as many.
    """
    questions = [choices for task in tasks for choices in halves.get(task, {}).values() if len(choices) > 1]
    if not questions:
        return None
    chosen = [[max(choices, key=lambda at: choices[at][half]) for half in (0, 1)] for choices in questions]
    rate = fmean(first != second for first, second in chosen)
    return FlipRate(rate, rate, len(questions))


def evaluate_tasks(saved: SavedRun, options: TaskOptions) -> dict[str, Any] | None:
    """Run the tasks, once for each seed; the figures on the main rank, None elsewhere.

    Raises:
        UserError: bad input, with the way out.
    """
    _quieten()
    optional_package("lm_eval", "--tasks", "eval")
    manager = _task_manager(options.names, options.include_path)
    tasks = _load_tasks(manager, options.names)
    if options.chat:
        template_of(saved, Tokenizer(saved.tokenizer), options.settings.template)  # refused before the model is loaded
    from lm_eval.evaluator import simple_evaluate

    from megatron_md.evaluate.harness import HarnessModel

    settings = asdict(options.settings)
    with parallel.session(saved.config) as world:
        model = HarnessModel(saved, batch_size=options.micro_batch_size, world=world, state=options.state, **settings)
        per_seed: dict[int, dict[str, Any]] = {}
        start = time.perf_counter()
        for seed in options.seeds:
            model.settings = replace(options.settings, seed=seed)
            with redirect_stdout(io.StringIO()):  # it prints on every rank
                found: Any = simple_evaluate(
                    model,
                    tasks=tasks,
                    task_manager=manager,
                    num_fewshot=options.num_fewshot,
                    limit=options.limit,
                    batch_size=options.micro_batch_size,
                    confirm_run_unsafe_code=options.unsafe_code,
                    apply_chat_template=options.chat,
                    fewshot_as_multiturn=options.multiturn,
                )
            if world.is_main:
                per_seed[seed] = found
        if not world.is_main:
            return None
        how = {**settings, **({"method": "autoregressive"} if model.causal else {})}
        del how["seed"]
        how |= {"num_fewshot": options.num_fewshot, "limit": options.limit}
        how |= {"apply_chat_template": options.chat, "fewshot_as_multiturn": options.multiturn}
        return {
            "run": saved.label,
            "step": saved.step,
            "seeds": list(options.seeds),
            "settings": how,
            "tasks": summary(per_seed, model.halves),
            "forward_passes": model.forward_passes,
            "shortened_prompts": model.shortened,
            "seconds": time.perf_counter() - start,
        }


def _quieten() -> None:
    """Before the harness is imported."""
    # The harness' own bars know nothing of ranks, and its bootstrap would fork a process that has threads.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("lm_eval").setLevel(logging.CRITICAL)


def summary(per_seed: Mapping[int, Mapping[str, Any]], halves: Halves | None = None) -> dict[str, dict[str, Any]]:
    """By task (and group): `metrics` under the harness' names, such as `acc,none` for metric and filter, and `flips`.

    A metric has its `mean` over seeds, the harness' standard error `stderr` over questions (of the first seed; None
    where it knows none), its value for each of the `seeds`, and their standard deviation `spread` (None of one seed).
    `half_flips` are those of multiple choices between the two halves of the draws, over all seeds.
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
        leaves = _leaves(task, first.get("group_subtasks", {}), first["samples"])
        between_halves = half_flips(halves or {}, leaves)
        if between_halves is not None:
            tasks[task]["half_flips"] = asdict(between_halves)
        if len(per_seed) > 1:
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

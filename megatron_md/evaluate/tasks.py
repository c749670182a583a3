"""A run's answers to tasks of lm-evaluation-harness, over some seeds, and how steady they are."""

from __future__ import annotations

import difflib
import io
import logging
import math
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
from megatron_md.diffusion.conditional import ConditionalEstimator
from megatron_md.diffusion.sampler_config import SamplerConfig
from megatron_md.errors import UserError
from megatron_md.run.saved import SavedRun

Answers = dict[Any, Any]
DEFAULT_LENGTH = 256  # the harness' own default for models that are not told


@dataclass(frozen=True)
class HarnessSettings:
    """How requests are answered.

    Attributes:
        method: `monte_carlo` or `left_to_right`; a causal run is always scored exactly.
        draws: masked copies of an answer under `monte_carlo`; one suffices for an answer of one token.
        seed: of the masks and of sampling.
        length: tokens of the canvas that is generated; the task's `max_gen_toks` if None.
        steps: denoising steps; one per token if None.
        block: tokens per block, from left to right; the whole canvas if None.
        strategy: of the sampler.
        temperature: of the sampler; the task's own if None.
        guidance: classifier-free guidance of the sampler.
    """

    method: str = "monte_carlo"
    draws: int = 128
    seed: int = 0
    length: int | None = None
    steps: int | None = None
    block: int | None = None
    strategy: str = "low_confidence"
    temperature: float | None = None
    guidance: float = 0.0

    def estimator(self, *, causal: bool) -> ConditionalEstimator:
        """The estimator of log p(answer | prompt).

        Raises:
            UserError: there is none of that name, or it takes no such number of draws.
        """
        if self.method not in ("monte_carlo", "left_to_right"):
            raise UserError(f"method {self.method!r}: unknown; use monte_carlo or left_to_right")
        if self.draws < 1:
            raise UserError(f"draws must be at least 1, got {self.draws}")
        name: Any = "autoregressive" if causal else self.method
        return ConditionalEstimator(name, draws=self.draws, minibatch=math.gcd(self.draws, 16), seed=self.seed)

    def sampler(self, request: dict[str, Any], max_length: int) -> SamplerConfig:
        """The sampler for a request's generation arguments.

        Raises:
            UserError: no canvas of that kind can be filled, or it leaves no room for a prompt.
        """
        length = self.length or int(request.get("max_gen_toks", DEFAULT_LENGTH))
        length += -length % (self.block or 1)
        if length >= max_length:
            raise UserError(
                f"{length} tokens to generate leave no room for a prompt in the model's {max_length} positions; "
                "give a smaller --length"
            )
        temperature = float(request.get("temperature") or 0.0) if request.get("do_sample") else 0.0
        temperature = temperature if self.temperature is None else self.temperature
        top_p = float(request.get("top_p") or 1.0) if temperature else 1.0
        return SamplerConfig(
            length=length,
            steps=self.steps,
            block=self.block,
            strategy=self.strategy,
            temperature=temperature,
            top_p=top_p,
            guidance=self.guidance,
            eos="stop",
            seed=self.seed,
        )


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
    """

    names: Sequence[str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    seeds: Sequence[int] = (0,)
    micro_batch_size: int = 8
    unsafe_code: bool = False
    settings: HarnessSettings = field(default_factory=HarnessSettings)


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


def evaluate_tasks(saved: SavedRun, options: TaskOptions) -> dict[str, Any] | None:
    """Run the tasks, once for each seed; the figures on the main rank, None elsewhere.

    Raises:
        UserError: bad input, with the way out.
    """
    _quieten()
    optional_package("lm_eval", "--tasks", "eval")
    manager = _task_manager(options.names, options.include_path)
    tasks = _load_tasks(manager, options.names)
    from lm_eval.evaluator import simple_evaluate

    from megatron_md.evaluate.harness import HarnessModel

    settings = asdict(options.settings)
    with parallel.session(saved.config) as world:
        model = HarnessModel(saved, batch_size=options.micro_batch_size, world=world, **settings)
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
                )
            if world.is_main:
                per_seed[seed] = found
        if not world.is_main:
            return None
        how = {**settings, **({"method": "autoregressive"} if model.causal else {})}
        del how["seed"]
        return {
            "run": saved.label,
            "step": saved.step,
            "seeds": list(options.seeds),
            "settings": {**how, "num_fewshot": options.num_fewshot, "limit": options.limit},
            "tasks": summary(per_seed),
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

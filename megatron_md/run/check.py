"""Every contradiction that can be seen in a config, its world size and its corpora, before torch is imported.

A check yields one line for each thing that is wrong; `check_config` raises all of them at once. What the keys alone
tell is checked beside them (`megatron_md/config`, the `problems` of each section); here is what needs more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_md.config import Config, ConfigError, ResolvedConfig, resolve
from megatron_md.data.cache import Cache
from megatron_md.data.mixture import MixtureSchedule
from megatron_md.data.shards import load_manifest
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.names import objectives
from megatron_md.diffusion.pairs import law_of_rates
from megatron_md.diffusion.schedule import Point, parse_schedule
from megatron_md.diffusion.token_rates import parse_token_rate
from megatron_md.messages import nearest
from megatron_md.plugins import import_plugins
from megatron_md.run.check_corpora import corpus_problems, missing_files
from megatron_md.run.check_lora import lora_problems
from megatron_md.run.epochs import count_steps
from megatron_md.train.sample_requests import sample_requests, sampler_config


@dataclass(frozen=True)
class Layout:
    """How the processes of a run are used.

    Attributes:
        tensor, pipeline, context, data: the parallel sizes; their product is `world`.
        micro_batches: micro-batches per data-parallel rank and step (at the full batch size).
        world: processes.
    """

    tensor: int
    pipeline: int
    context: int
    data: int
    micro_batches: int
    world: int


def check_config(config: Config, world_size: int, *, corpora: bool = True, trust: bool = True) -> Layout:
    """Check a config against itself, the number of processes and (if asked) the files that it names.

    Args:
        config: the run.
        world_size: processes.
        corpora: check the files too.
        trust: see `import_plugins`.

    Raises:
        ConfigError: one clear line for each contradiction.
    """
    lines = [
        *config.problems(),
        *_check_world(config, world_size),
        *_check_batch(config, world_size),
        *_check_objective(config, trust),
        *_check_mixture(config),
        *_check_run_dir(config),
        *_check_sampler(config),
    ]
    if corpora:
        lines += [*missing_files(config), *corpus_problems(config)]
    if corpora and not lines:
        lines += [*_check_prompts(config), *lora_problems(config), *_check_epochs(config)]
    if lines:
        raise ConfigError(lines)
    parallel = config.parallel
    data = world_size // parallel.replica
    micro_batches = config.train.global_batch_size // (data * config.train.micro_batch_size)
    return Layout(parallel.tensor, parallel.pipeline, parallel.context, data, micro_batches, world_size)


def check_split(config: Config) -> None:
    """Check only that tensor and pipeline parallelism can split the model, which is all that an evaluation needs.

    Raises:
        ConfigError: one clear line for each contradiction.
    """
    lines = list(config.parallel.problems(config))
    if lines:
        raise ConfigError(lines)


def resolve_config(config: Config) -> ResolvedConfig:
    """A checked config with its vocabulary size: `model.vocab`, else the tokenizer's, else the training shards'.

    Raises:
        ConfigError: none of them is to be had.
    """
    if config.model.vocab is not None:
        return resolve(config)
    try:
        if config.data.tokenizer is not None:
            return resolve(config, Tokenizer(config.data.tokenizer).vocab_size)
        if config.data.corpora():
            first = load_manifest(config.data.corpora()[0].manifest, cache=Cache.of(config.data))
            return resolve(config, first.vocab_size)
    except ValueError as error:
        raise ConfigError(
            f"model.vocab is null, so the tokenizer or the shards must tell it: {error}; or set model.vocab"
        ) from None
    raise ConfigError("model.vocab is null, and neither data.tokenizer nor data.train tells it: set one of them")


def _check_world(config: Config, world: int) -> Iterator[str]:
    parallel, needed = config.parallel, config.parallel.replica
    sizes = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    if world < needed:
        yield f"the layout needs {needed} processes ({sizes}), not {world}: start with --nproc-per-node {needed}"
    elif world % needed:
        yield f"{world} processes are more than the layout needs: {sizes} takes multiples of {needed}"


def _check_batch(config: Config, world: int) -> Iterator[str]:
    train, ramp = config.train, config.train.batch_ramp
    data = max(1, world // config.parallel.replica)
    unit = data * train.micro_batch_size
    pipeline, interleaved = config.parallel.pipeline, config.parallel.virtual_pipeline > 1
    sizes = {"train.global_batch_size": train.global_batch_size}
    if ramp is not None:
        sizes |= {"train.batch_ramp.start": ramp.start, "train.batch_ramp.increment": ramp.increment}
    for name, rows in sizes.items():
        if rows % unit:
            much = f": {world} processes are more than the batch needs" if rows < unit else ""
            yield f"{name} {rows} is no multiple of {unit} = data-parallel {data} x train.micro_batch_size{much}"
        elif interleaved and rows // unit % pipeline:
            yield (
                f"{name} {rows} makes {rows // unit} micro-batches per rank; "
                f"parallel.virtual_pipeline needs a multiple of parallel.pipeline {pipeline}"
            )


def _check_objective(config: Config, trust: bool) -> Iterator[str]:
    objective = config.objective
    try:
        import_plugins(config, trust=trust)
        schedule = parse_schedule(objective.mask_schedule)
    except ConfigError as error:
        yield from error.lines
        return
    except ValueError as error:
        yield f"objective.mask_schedule: {str(error).removeprefix('mask_schedule ')}"
        return
    try:
        parse_token_rate(objective.token_rate)
    except ValueError as error:
        yield str(error)
        return
    # A third party's need not be registered where only the config is checked.
    if not config.imports and objective.name not in objectives.built_in:
        known, close = ", ".join(objectives.built_in), nearest(objective.name, objectives.built_in)
        yield f"objective.name {objective.name!r} is unknown{close} (known: {known}; add others by imports)"
    if objective.block_stages and float(schedule.cdf(np.zeros(1))[0]) > 0.0:
        yield f"objective.mask_schedule {schedule} has a rate of exactly 0, at which a block predicts nothing: raise it"
    if objective.pairs == "antithetic" and isinstance(schedule, Point):
        yield f"objective.pairs antithetic mirrors the mask rate, which {schedule} does not vary: set none"
    if objective.importance and not law_of_rates(objective).has_full_support():
        yield (
            f"objective.importance needs a density above 0 on all of [0, 1], which {objective.mask_schedule} lacks: "
            "use a mixture with uniform:0,1, or set objective.importance=false"
        )


def _check_mixture(config: Config) -> Iterator[str]:
    try:
        if corpora := config.data.corpora():
            MixtureSchedule([corpus.points() for corpus in corpora])
    except ValueError as error:
        yield f"data.train: {error}"


def _check_run_dir(config: Config) -> Iterator[str]:
    path = Path(config.run_dir).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        yield f"run_dir {config.run_dir}: {existing} is a file"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"run_dir {config.run_dir}: {existing} is not writable"


def _check_sampler(config: Config) -> Iterator[str]:
    try:
        if config.sampling.every_steps:
            sampler_config(config)
    except ValueError as error:
        yield f"sampling: {error}"


def _check_epochs(config: Config) -> Iterator[str]:
    try:
        count_steps(config)
    except ConfigError as error:
        yield from error.lines
    except ValueError as error:
        yield str(error)


def _check_prompts(config: Config) -> Iterator[str]:
    try:
        if config.sampling.every_steps and config.data.tokenizer is not None:
            sample_requests(config, Tokenizer(config.data.tokenizer))
    except ValueError as error:
        yield str(error)

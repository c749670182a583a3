"""Every contradiction that can be seen in a config, its world size and its corpora, before torch is imported.

A check yields one line for each thing that is wrong; `check_config` raises all of them at once.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_md.config import Config
from megatron_md.config.loader import ConfigError, nearest
from megatron_md.data.cache import Cache
from megatron_md.data.mixture import MixtureSchedule
from megatron_md.data.shards import load_manifest
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.schedule import parse_schedule
from megatron_md.plugins import import_plugins
from megatron_md.run.check_corpora import corpus_problems, missing_files
from megatron_md.train.progress import row_length_unit

MOST_RANDOM_STEPS = 10_000_000  # each of them is drawn before a run starts: seconds for a million
BUILT_IN_OBJECTIVES = ("masked_diffusion", "masked_diffusion_sft", "autoregressive")


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


def smallest_world(config: Config) -> int:
    """Processes of one replica of the model: tensor x pipeline x context."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


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
        *_check_heads(config),
        *_check_tensor_parallel(config),
        *_check_pipeline(config),
        *_check_world(config, world_size),
        *_check_batch(config, world_size),
        *_check_learning_rate(config),
        *_check_spike_factor(config),
        *_check_objective(config, trust),
        *_check_mixture(config),
        *_check_random_length(config),
        *_check_attention(config),
        *_check_run_dir(config),
        *_check_checkpoint(config),
        *_check_sampling(config),
        *_check_wandb(config),
    ]
    if corpora:
        lines += [*missing_files(config), *corpus_problems(config)]
    if corpora and not lines:
        lines += _check_prompts(config)
    if lines:
        raise ConfigError(lines)
    parallel = config.parallel
    data = world_size // smallest_world(config)
    micro_batches = config.train.global_batch_size // (data * config.train.micro_batch_size)
    return Layout(parallel.tensor, parallel.pipeline, parallel.context, data, micro_batches, world_size)


def check_split(config: Config) -> None:
    """Check only that tensor and pipeline parallelism can split the model, which is all that an evaluation needs.

    Raises:
        ConfigError: one clear line for each contradiction.
    """
    lines = [*_check_tensor_parallel(config), *_check_pipeline(config)]
    if lines:
        raise ConfigError(lines)


def vocabulary(config: Config) -> int:
    """Vocabulary size of the model: `model.vocab`, else the tokenizer's, else the training shards'.

    Raises:
        ConfigError: none of them is to be had.
    """
    if config.model.vocab is not None:
        return config.model.vocab
    try:
        if config.data.tokenizer is not None:
            return Tokenizer(config.data.tokenizer).vocab_size
        if config.data.corpora():
            return load_manifest(config.data.corpora()[0].manifest, cache=Cache.of(config.data)).vocab_size
    except ValueError as error:
        raise ConfigError(
            [f"model.vocab is null, so the tokenizer or the shards must tell it: {error}; or set model.vocab"]
        ) from None
    raise ConfigError(["model.vocab is null, and neither data.tokenizer nor data.train tells it: set one of them"])


def _check_heads(config: Config) -> Iterator[str]:
    model, data = config.model, config.data
    if model.head_dim is None and model.hidden % model.heads:
        yield f"model.heads {model.heads} does not divide model.hidden {model.hidden}; change one or set model.head_dim"
    if model.heads % (model.kv_heads or model.heads):
        yield f"model.kv_heads {model.kv_heads} does not divide model.heads {model.heads}"
    head_dim = model.head_dim or model.hidden // model.heads
    if model.position == "rope" and head_dim % 2:
        yield f"rotary positions need an even width per head, got {head_dim}: change model.heads or model.head_dim"
    if model.max_length is not None and model.max_length < data.seq_length:
        yield f"data.seq_length {data.seq_length} is longer than model.max_length {model.max_length}"


def _check_tensor_parallel(config: Config) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    sizes = {"heads": model.heads, "kv_heads": model.kv_heads or model.heads, "ffn": model.ffn}
    if model.kv_heads is None:
        del sizes["kv_heads"]
    for name, size in sizes.items():
        if size % tensor:
            yield f"parallel.tensor {tensor} does not divide model.{name} {size}"
    if config.parallel.sequence_parallel:
        if tensor == 1:
            yield "parallel.sequence_parallel needs parallel.tensor > 1: it splits rows between tensor-parallel ranks"
        if config.data.seq_length % tensor:
            yield (
                f"parallel.tensor {tensor} does not divide data.seq_length {config.data.seq_length}, "
                "which parallel.sequence_parallel splits"
            )
    if config.parallel.context > 1:
        yield (
            f"parallel.context {config.parallel.context}: no attention backend here supports context parallelism yet; "
            "set parallel.context=1"
        )
    if config.parallel.overlap_param_gather:
        for name in ("distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(config.parallel, name):
                yield f"parallel.overlap_param_gather needs parallel.{name}"


def _check_pipeline(config: Config) -> Iterator[str]:
    layers, parallel = config.model.layers, config.parallel
    pipeline, chunks = parallel.pipeline, parallel.virtual_pipeline
    if chunks > 1 and pipeline == 1:
        yield f"parallel.virtual_pipeline {chunks} needs parallel.pipeline > 1"
    ends = {"first": parallel.first_stage_layers, "last": parallel.last_stage_layers}
    given = {name: count for name, count in ends.items() if count is not None}
    if not given:
        if layers % (pipeline * chunks):
            by = f"{pipeline} x parallel.virtual_pipeline {chunks}" if chunks > 1 else f"{pipeline}"
            way_out = " (or set first_stage_layers / last_stage_layers)" if chunks == 1 else ""
            yield f"parallel.pipeline {by} does not divide model.layers {layers}{way_out}"
        return
    names = " and ".join(f"parallel.{name}_stage_layers {count}" for name, count in given.items())
    rest, stages = layers - sum(given.values()), pipeline - len(given)
    if pipeline == 1 or stages < 0:
        yield f"{names} need parallel.pipeline > 1"
    elif rest < 0 or (stages == 0 and rest) or (stages and (rest % stages or rest < stages)):
        yield f"{names} leave {rest} of model.layers {layers} to {stages} other stage(s), which cannot share them"
    elif any(count % chunks for count in [*given.values(), rest // stages if stages else 0]):
        yield f"parallel.virtual_pipeline {chunks} does not divide the layers of every stage ({names})"


def _check_world(config: Config, world: int) -> Iterator[str]:
    parallel, needed = config.parallel, smallest_world(config)
    sizes = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
    if world < needed:
        yield f"the layout needs {needed} processes ({sizes}), not {world}: start with --nproc-per-node {needed}"
    elif world % needed:
        yield f"{world} processes are more than the layout needs: {sizes} takes multiples of {needed}"


def _check_batch(config: Config, world: int) -> Iterator[str]:
    train, ramp = config.train, config.train.batch_ramp
    data = max(1, world // smallest_world(config))
    unit = data * train.micro_batch_size
    pipeline, interleaved = config.parallel.pipeline, config.parallel.virtual_pipeline > 1
    sizes = {"train.global_batch_size": train.global_batch_size}
    if ramp is not None:
        sizes |= {"train.batch_ramp.start": ramp.start, "train.batch_ramp.increment": ramp.increment}
        if ramp.start > train.global_batch_size:
            yield f"train.batch_ramp.start {ramp.start} is above train.global_batch_size {train.global_batch_size}"
        if ramp.steps > train.steps:
            yield f"train.batch_ramp.steps {ramp.steps} is more than train.steps {train.steps}: the ramp would not end"
    for name, rows in sizes.items():
        if rows % unit:
            much = f": {world} processes are more than the batch needs" if rows < unit else ""
            yield f"{name} {rows} is no multiple of {unit} = data-parallel {data} x train.micro_batch_size{much}"
        elif interleaved and rows // unit % pipeline:
            yield (
                f"{name} {rows} makes {rows // unit} micro-batches per rank; "
                f"parallel.virtual_pipeline needs a multiple of parallel.pipeline {pipeline}"
            )


def _check_learning_rate(config: Config) -> Iterator[str]:
    peak, shape = config.optimizer.lr, config.optimizer.lr_schedule
    if shape.min_lr > peak:
        yield f"optimizer.lr_schedule.min_lr {shape.min_lr:g} is above optimizer.lr {peak:g}"
    if shape.name == "piecewise":
        at = [fraction for fraction, _ in shape.points]
        if not at:
            yield "optimizer.lr_schedule piecewise needs points: [[fraction of the run, learning rate], ...]"
        if at != sorted(at):
            yield "optimizer.lr_schedule.points must come in order of their fractions"
    elif shape.points:
        yield f"optimizer.lr_schedule.points belong to piecewise, but the name is {shape.name}"
    if shape.decay_steps is not None and shape.name not in ("cosine", "wsd"):
        yield f"optimizer.lr_schedule.decay_steps belongs to cosine and wsd, but the name is {shape.name}"


def _check_spike_factor(config: Config) -> Iterator[str]:
    factor = config.train.spike_factor
    if factor and factor <= 1.0:
        yield f"train.spike_factor {factor:g} would leave out ordinary updates: it must be above 1, or 0 for none"


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
    # Third-party objectives are known only to the registry, which needs torch.
    if not config.imports and objective.name not in BUILT_IN_OBJECTIVES:
        known = ", ".join(BUILT_IN_OBJECTIVES)
        close = nearest(objective.name, BUILT_IN_OBJECTIVES)
        yield f"objective.name {objective.name!r} is unknown{close} (known: {known}; add others by imports)"
    if objective.right_shift and config.data.document_attention == "within_document":
        yield (
            "objective.right_shift predicts a document's first token from the document before it, which "
            "data.document_attention within_document keeps apart: set one of them back"
        )
    if objective.importance and not schedule.has_full_support():
        yield (
            f"objective.importance needs a density above 0 on all of [0, 1], which {objective.mask_schedule} lacks: "
            "use a mixture with uniform:0,1, or set objective.importance=false"
        )


def _check_mixture(config: Config) -> Iterator[str]:
    corpora = config.data.corpora()
    if not corpora:
        return
    names = [corpus.label for corpus in corpora]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"data.train: two corpora are called {name!r}; give each of them its own name"
    try:
        MixtureSchedule([corpus.points() for corpus in corpora])
    except ValueError as error:
        yield f"data.train: {error}"


def _check_random_length(config: Config) -> Iterator[str]:
    unit = row_length_unit(config)
    if config.data.random_length_fraction and config.train.steps > MOST_RANDOM_STEPS:
        yield (
            f"train.steps {config.train.steps} is above {MOST_RANDOM_STEPS}, the most of which "
            "data.random_length_fraction counts the tokens; set one of them back"
        )
    if config.data.random_length_fraction and config.data.seq_length < unit:
        yield (
            f"data.random_length_fraction needs data.seq_length of at least {unit}, of which parallel.tensor and "
            "2 x parallel.context are divisors"
        )


def _check_attention(config: Config) -> Iterator[str]:
    is_within, annealing = config.data.document_attention == "within_document", config.objective.attention_annealing
    if config.train.device != "cpu" and importlib.util.find_spec("transformer_engine") is not None:
        where, way_out = "Transformer Engine is installed, and its attention does not take", "or train.device=cpu"
        if is_within:
            yield (
                f"data.document_attention within_document: {where} document boundaries here; uninstall it, or set "
                f"data.document_attention=full {way_out}"
            )
        if annealing:
            yield (
                f"objective.attention_annealing {annealing:g}: {where} hidden pairs here; uninstall it, or set "
                f"objective.attention_annealing=0 {way_out}"
            )
    if annealing and is_within:
        yield (
            "objective.attention_annealing hides pairs of whole rows, and data.document_attention within_document cuts "
            "them up: set one of them back"
        )
    if annealing and config.objective.name == "autoregressive":
        yield "objective.attention_annealing: attention of autoregressive is always causal; set it to 0"


def _check_sampling(config: Config) -> Iterator[str]:
    keys, context = config.sampling, config.model.max_length or config.data.seq_length
    if not keys.every_steps:
        return
    if config.data.tokenizer is None:
        yield "sampling.every_steps needs data.tokenizer, to read prompts and to write texts; set it, or every_steps 0"
    if not keys.prompts:
        yield 'sampling.prompts is empty: give a prompt ("" starts from nothing), or set sampling.every_steps=0'
    if keys.length > context:
        yield f"sampling.length {keys.length} exceeds the model's {context} positions; shorten it"
    # The sampler's rules need torch, which a run without samples is checked without.
    from megatron_md.train.sample_requests import sampler_config

    try:
        sampler_config(config)
    except ValueError as error:
        yield f"sampling: {error}"


def _check_prompts(config: Config) -> Iterator[str]:
    if config.sampling.every_steps and config.data.tokenizer is not None:
        from megatron_md.train.sample_requests import sample_requests

        try:
            sample_requests(config, Tokenizer(config.data.tokenizer))
        except ValueError as error:
            yield str(error)


def _check_wandb(config: Config) -> Iterator[str]:
    if config.log.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        yield "log.wandb_project is set, but wandb is not installed: pip install wandb, or leave the key out"


def _check_run_dir(config: Config) -> Iterator[str]:
    path = Path(config.run_dir).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        yield f"run_dir {config.run_dir}: {existing} is a file"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"run_dir {config.run_dir}: {existing} is not writable"


def _check_checkpoint(config: Config) -> Iterator[str]:
    keys = config.checkpoint
    if keys.load_only is not None and keys.load is None:
        yield "checkpoint.load_only says what to take of checkpoint.load, which is not set"
    if keys.keep_best and not config.validation.sequences:
        yield "checkpoint.keep_best chooses by val_nelbo, and validation.sequences 0 turns validation off"

"""Configuration of a k-parity run or sweep: the sections of a training run, and those of the task.

`training_config` gives the training run's own configuration. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_md.config import (
    Config,
    ConfigError,
    DataConfig,
    LogConfig,
    MegatronConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    ResolvedConfig,
    TrainConfig,
    ValidationConfig,
    resolve,
)
from megatron_md.config import loader as config_loader
from megatron_md.config.schema import STRICT, Doc, Fraction, PositiveInt, Seed
from megatron_md.run.check import check_config
from megatron_md.sweep.plan import SweepConfig

VOCABULARY, MASK_TOKEN_ID = 3, 2  # the bits 0 and 1, and the mask token
MOST_BITS = 62
DIRECT = "direct_supervision"


@dataclass(frozen=True)
class TaskConfig:
    """The (n, k) task."""

    __pydantic_config__ = STRICT

    n: Annotated[int, Field(ge=1, le=MOST_BITS, description="bits of an input")] = 10
    k: Annotated[PositiveInt, Doc("secret bits whose parity is the label")] = 3
    train_samples: Annotated[
        PositiveInt | None, Doc("distinct inputs of the fixed training set; null: fresh ones without end")
    ] = 200
    valid_samples: Annotated[PositiveInt, Doc("distinct held-out inputs, never trained on")] = 800
    seed: Annotated[Seed | None, Doc("seed of the secret and the inputs; the run's seed if null")] = None


@dataclass(frozen=True)
class AccuracyConfig:
    """When label accuracy is measured, and when a run has learnt enough."""

    __pydantic_config__ = STRICT

    every_steps: Annotated[PositiveInt, Doc("steps between measurements, each of which is logged")] = 50
    train_samples: Annotated[PositiveInt, Doc("training samples that are measured, at most")] = 1000
    stop_at: Annotated[
        Fraction | None, Doc("validation accuracy at which the run ends; null: it goes on to train.steps")
    ] = 0.99


@dataclass(frozen=True)
class UniformAttentionConfig:
    """The model without Megatron: an MLP on the sum of one-hot embeddings, one output for all positions."""

    __pydantic_config__ = STRICT

    hidden: Annotated[PositiveInt, Doc("width of each hidden layer")] = 512
    layers: Annotated[PositiveInt, Doc("hidden layers")] = 1


@dataclass(frozen=True)
class ParityConfig:
    """A k-parity run, and the sweep over its variants."""

    __pydantic_config__ = STRICT

    run_dir: Annotated[str, Doc("directory of the run, or of the sweep's runs")] = "runs/parity"
    seed: Annotated[Seed, Doc("seed of the task, the order, the corruption and the initial weights")] = 1
    denoiser: Annotated[
        Literal["transformer", "uniform_attention"], Doc("megatron-core's transformer, or the MLP of uniform_attention")
    ] = "transformer"
    task: Annotated[TaskConfig, Doc("the (n, k) task")] = field(default_factory=TaskConfig)
    accuracy: Annotated[AccuracyConfig, Doc("measurement of label accuracy")] = field(default_factory=AccuracyConfig)
    uniform_attention: Annotated[UniformAttentionConfig, Doc("the model without Megatron")] = field(
        default_factory=UniformAttentionConfig
    )
    sweep: Annotated[SweepConfig, Doc("arms and seeds of a sweep")] = field(default_factory=SweepConfig)
    model: Annotated[ModelConfig, Doc("the transformer; as in a training run, from here on")] = field(
        default_factory=ModelConfig
    )
    parallel: Annotated[ParallelConfig, Doc("parallel layout")] = field(default_factory=ParallelConfig)
    objective: Annotated[
        ObjectiveConfig, Doc("as in a training run, or direct_supervision (options: {mask_inputs: true | false})")
    ] = field(default_factory=ObjectiveConfig)
    optimizer: Annotated[OptimizerConfig, Doc("AdamW and its learning rate")] = field(default_factory=OptimizerConfig)
    train: Annotated[TrainConfig, Doc("the loop")] = field(default_factory=TrainConfig)
    log: Annotated[LogConfig, Doc("logging; every_steps divides accuracy.every_steps")] = field(
        default_factory=LogConfig
    )
    megatron: Annotated[MegatronConfig, Doc("pass-through to megatron-core")] = field(default_factory=MegatronConfig)
    imports: Annotated[list[str], Doc("modules that register third-party schedules and objectives")] = field(
        default_factory=list
    )

    @property
    def task_seed(self) -> int:
        """Seed of the secret and the inputs."""
        return self.seed if self.task.seed is None else self.task.seed


def load_parity_config(path: str | Path, overrides: Sequence[str] = ()) -> ParityConfig:
    """The run or sweep that a YAML file describes, changed by `section.key=value` words.

    Raises:
        ConfigError: one line for every unknown key, wrong type or value out of bounds.
    """
    mapping = config_loader.read_yaml(path)
    overridden = config_loader.apply_overrides(mapping, overrides)
    return config_loader.validate(ParityConfig, mapping, str(path), overridden)


def training_config(config: ParityConfig) -> ResolvedConfig:
    """The configuration of the training run inside."""
    length = config.task.n + 1
    training = Config(
        run_dir=config.run_dir,
        seed=config.seed,
        model=replace(config.model, vocab=VOCABULARY, max_length=length),
        parallel=config.parallel,
        data=DataConfig(seq_length=length, prefetch=1),
        objective=config.objective,
        optimizer=config.optimizer,
        # Theory is compared in fp32, on every device, unless asked otherwise. The loss of a drawn t varies by orders of
        # magnitude, and is no reason to leave an update out.
        train=replace(config.train.settled("cpu"), spike_factor=None, max_skipped=0),
        validation=ValidationConfig(sequences=0),
        log=config.log,
        megatron=config.megatron,
        imports=config.imports,
    )
    return resolve(training)


def check_parity(config: ParityConfig, world_size: int = 1) -> None:
    """Check a config against itself and the number of processes.

    Raises:
        ConfigError: one clear line for each contradiction.
    """
    lines = [*_check_task(config.task), *_check_model(config, world_size), *_check_rest(config)]
    training = training_config(config)
    if config.objective.name == DIRECT:
        # Known to this package only; everything else about the run is checked as ever.
        training = replace(training, objective=replace(training.objective, name="masked_diffusion"))
    try:
        check_config(training, world_size, corpora=False)
    except ConfigError as error:
        lines += [line.replace("data.seq_length", "task.n + 1 =") for line in error.lines]
    if lines:
        raise ConfigError(lines)


def _check_task(task: TaskConfig) -> Iterator[str]:
    if task.k > task.n:
        yield f"task.k {task.k} is above task.n {task.n}: only {task.n} bits can be secret"
    inputs = 2**task.n
    train = task.train_samples or 0
    if train > inputs:
        yield f"task.train_samples {train} is more than there are inputs of {task.n} bits, {inputs}"
    elif train + task.valid_samples > inputs:
        yield (
            f"task.train_samples {train} leaves {inputs - train} of the {inputs} inputs of {task.n} bits, fewer than "
            f"task.valid_samples {task.valid_samples}"
        )
    elif task.train_samples is None and task.valid_samples == inputs:
        yield f"task.valid_samples {task.valid_samples} leaves no input of {task.n} bits to train on"


def _check_model(config: ParityConfig, world_size: int) -> Iterator[str]:
    if config.model.preset is not None:
        yield "model.preset: presets are for language models; give model.layers, model.hidden, model.heads, model.ffn"
    for name in ("vocab", "max_length"):
        if getattr(config.model, name) is not None:
            yield f"model.{name}: the task decides it; leave it out"
    if config.denoiser == "uniform_attention":
        if world_size > 1:
            yield f"denoiser uniform_attention runs in one process, not {world_size}"
        if config.train.device == "cuda":
            yield "denoiser uniform_attention runs on the CPU: set train.device=cpu or auto"


def _check_rest(config: ParityConfig) -> Iterator[str]:
    if config.objective.mask_logit == "keep":
        yield "objective.mask_logit keep: label accuracy needs exactly two tokens to choose from; set exclude"
    if config.objective.name == "autoregressive":
        yield "objective.name autoregressive: the label of a causal model sees no mask; use direct_supervision"
    if config.objective.pairs == "complementary":
        yield "objective.pairs complementary: the samples of a parity batch come once each; set none or antithetic"
    if config.accuracy.every_steps % config.log.every_steps:
        yield (
            f"accuracy.every_steps {config.accuracy.every_steps} is no multiple of log.every_steps "
            f"{config.log.every_steps}: some measurements would not be logged"
        )
    if config.train.batch_ramp is not None:
        yield "train.batch_ramp: parity runs have one batch size"
    if config.train.epochs is not None:
        yield "train.epochs: parity runs have no corpus; give train.steps"

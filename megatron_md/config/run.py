"""A whole run: all sections, as a config file has them and as a run knows them once nothing is open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from megatron_md.config.data import DataConfig
from megatron_md.config.keys import STRICT, Doc, Seed
from megatron_md.config.loader import ConfigError
from megatron_md.config.model import MegatronConfig, ModelConfig, ParallelConfig
from megatron_md.config.objective import ObjectiveConfig
from megatron_md.config.outputs import CheckpointConfig, LogConfig, SamplingConfig, ValidationConfig
from megatron_md.config.training import OptimizerConfig, TrainConfig


@dataclass(frozen=True)
class Config:
    """A whole run."""

    __pydantic_config__ = STRICT

    run_dir: Annotated[str, Doc("directory of the run: config, metrics, checkpoints")] = "runs/default"
    seed: Annotated[Seed, Doc("seed of the data order, the corruption and the initial weights")] = 1234
    model: Annotated[ModelConfig, Doc("the denoiser")] = field(default_factory=ModelConfig)
    parallel: Annotated[ParallelConfig, Doc("parallel layout")] = field(default_factory=ParallelConfig)
    data: Annotated[DataConfig, Doc("corpus and tokenizer")] = field(default_factory=DataConfig)
    objective: Annotated[ObjectiveConfig, Doc("training objective")] = field(default_factory=ObjectiveConfig)
    optimizer: Annotated[OptimizerConfig, Doc("AdamW and its learning rate")] = field(default_factory=OptimizerConfig)
    train: Annotated[TrainConfig, Doc("the loop")] = field(default_factory=TrainConfig)
    checkpoint: Annotated[CheckpointConfig, Doc("saving and resuming")] = field(default_factory=CheckpointConfig)
    validation: Annotated[ValidationConfig, Doc("validation during training")] = field(default_factory=ValidationConfig)
    sampling: Annotated[SamplingConfig, Doc("texts during training")] = field(default_factory=SamplingConfig)
    log: Annotated[LogConfig, Doc("logging")] = field(default_factory=LogConfig)
    megatron: Annotated[MegatronConfig, Doc("pass-through to megatron-core")] = field(default_factory=MegatronConfig)
    imports: Annotated[list[str], Doc("modules that register third-party schedules and objectives")] = field(
        default_factory=list
    )

    @property
    def positions(self) -> int:
        """Tokens of the longest row that the model takes: `model.max_length`, or `data.seq_length` if that is null."""
        return self.model.max_length or self.data.seq_length

    def problems(self) -> Iterator[str]:
        """A line for each contradiction between keys, as far as the keys alone tell; `run.check` knows the rest."""
        yield from self.model.problems(self)
        yield from self.parallel.problems(self)
        yield from self.data.problems(self)
        yield from self.objective.problems(self)
        yield from self.optimizer.problems()
        yield from self.train.problems()
        yield from self.checkpoint.problems(self)
        yield from self.sampling.problems(self)
        yield from self.log.problems()


@dataclass(frozen=True, kw_only=True)
class ResolvedModel(ModelConfig):
    """A shape in which nothing is open.

    Attributes:
        vocab: vocabulary size.
        max_length: longest sequence.
        is_length_given: `max_length` was written in the config, and is in what a run keeps of it.
    """

    vocab: int
    max_length: int
    is_length_given: bool = True


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(Config):
    """A run in which nothing is open: what a model is built from."""

    model: ResolvedModel


def resolve(config: Config, vocab: int | None = None) -> ResolvedConfig:
    """The config with vocabulary and length settled; everything below builds on one that has passed here.

    Args:
        config: the run.
        vocab: vocabulary size where `model.vocab` is null.

    Raises:
        ConfigError: neither says it.
    """
    if isinstance(config, ResolvedConfig):
        return config
    vocab = config.model.vocab or vocab
    if vocab is None:
        raise ConfigError("model.vocab is missing")
    settled = {"vocab": vocab, "max_length": config.positions, "is_length_given": config.model.max_length is not None}
    model = ResolvedModel(**{**_values(config.model), **settled})
    return ResolvedConfig(**{**_values(config), "model": model})


def _values(section: Any) -> dict[str, Any]:
    return {key.name: getattr(section, key.name) for key in fields(section)}


def as_dict(config: Config) -> dict[str, Any]:
    """The config as nested dictionaries, as a file would have it."""
    content = asdict(config)
    if not content["model"].pop("is_length_given", True):
        content["model"]["max_length"] = None
    return content

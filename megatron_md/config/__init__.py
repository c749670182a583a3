"""Configuration of a run: frozen dataclasses, filled from one YAML file and dotted overrides, strictly.

Every key carries its explanation (`megatron-md train --help` prints them all), its type and its bounds.
This module imports neither torch nor Megatron, so that a bad config is refused within a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from megatron_md.config import loader as config_loader
from megatron_md.config.chat import ChatConfig
from megatron_md.config.loader import ConfigError
from megatron_md.config.lora import LoraConfig
from megatron_md.config.model import (
    CorpusConfig,
    DataConfig,
    MegatronConfig,
    ModelConfig,
    ParallelConfig,
)
from megatron_md.config.objective import ObjectiveConfig
from megatron_md.config.schema import STRICT, Doc, Seed
from megatron_md.config.schema import explain as explain_keys
from megatron_md.config.training import (
    BatchRampConfig,
    CheckpointConfig,
    LogConfig,
    LRScheduleConfig,
    OptimizerConfig,
    ProfileConfig,
    SamplingConfig,
    TrainConfig,
    ValidationConfig,
)
from megatron_md.messages import nearest

__all__ = [
    "BatchRampConfig", "ChatConfig", "CheckpointConfig", "Config", "ConfigError", "CorpusConfig", "DataConfig",
    "LRScheduleConfig", "LogConfig", "LoraConfig", "MegatronConfig", "ModelConfig", "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig", "ProfileConfig", "ResolvedConfig", "ResolvedModel", "SamplingConfig", "TrainConfig",
    "ValidationConfig", "as_dict", "config_from_mapping", "explain", "load_config", "load_resolved", "preset_names",
    "resolve", "to_yaml",
]  # fmt: skip


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
    lora: Annotated[LoraConfig | None, Doc("low-rank adapters; null trains all weights")] = None
    optimizer: Annotated[OptimizerConfig, Doc("AdamW and its learning rate")] = field(default_factory=OptimizerConfig)
    train: Annotated[TrainConfig, Doc("the loop")] = field(default_factory=TrainConfig)
    checkpoint: Annotated[CheckpointConfig, Doc("saving and resuming")] = field(default_factory=CheckpointConfig)
    validation: Annotated[ValidationConfig, Doc("validation during training")] = field(default_factory=ValidationConfig)
    sampling: Annotated[SamplingConfig, Doc("texts during training")] = field(default_factory=SamplingConfig)
    log: Annotated[LogConfig, Doc("logging")] = field(default_factory=LogConfig)
    megatron: Annotated[MegatronConfig, Doc("pass-through to megatron-core")] = field(default_factory=MegatronConfig)
    imports: Annotated[list[str], Doc("modules that register third-party schedules, objectives and callbacks")] = field(
        default_factory=list
    )

    @property
    def positions(self) -> int:
        """Tokens of the longest row that the model takes: `model.max_length`, or `data.seq_length` if that is null."""
        return self.model.max_length or self.data.seq_length

    @property
    def row_unit(self) -> int:
        """What the length of dialogues' rows is a multiple of, where it is not `data.seq_length`."""
        sizes = (stage.size for stage in self.objective.block_stages if stage.size < self.data.seq_length)
        return math.lcm(self.data.chat.length_multiple, self.parallel.row_unit, *sizes)

    def problems(self) -> Iterator[str]:
        """A line for each contradiction between keys, as far as the keys alone tell; `run.check` knows the rest."""
        yield from self.model.problems(self)
        yield from self.parallel.problems(self)
        yield from self.data.problems(self)
        yield from self.objective.problems(self)
        yield from self.lora.problems(self) if self.lora else ()
        yield from self.optimizer.problems()
        yield from self.train.problems(self)
        yield from self.checkpoint.problems(self)
        yield from self.validation.problems(self)
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
    if content["train"]["epochs"] is not None:
        del content["train"]["steps"]  # not counted yet
    if not content["model"].pop("is_length_given", True):
        content["model"]["max_length"] = None
    return content


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The run that a YAML file describes.

    A key is taken from the overrides, else from the file, else (under `model`) from the preset, else it is the default.

    Args:
        path: YAML file.
        overrides: `section.key=value`, values in YAML, the last one wins.

    Raises:
        ConfigError: one line for every unknown key, wrong type or value out of bounds, each with its full name.
    """
    return config_from_mapping(config_loader.read_yaml(path), overrides, source=str(path))


def config_from_mapping(mapping: dict[str, Any], overrides: Sequence[str] = (), *, source: str = "config") -> Config:
    """The run that nested keys describe; like `load_config` without a file.

    Raises:
        ConfigError: as `load_config`.
    """
    mapping = {**mapping}
    overridden = config_loader.apply_overrides(mapping, overrides)
    train = mapping.get("train")
    if isinstance(train, dict) and None not in (train.get("steps"), train.get("epochs")):
        raise ConfigError(f"{source}: both train.steps and train.epochs are given; set one of them to null")
    model = mapping.get("model")
    if isinstance(model, dict) and isinstance(model.get("preset"), str):
        mapping["model"] = {**_preset(model["preset"], source), **model}
    return config_loader.validate(Config, mapping, source, overridden)


def load_resolved(path: str | Path) -> ResolvedConfig:
    """The config that a run or a checkpoint keeps.

    Raises:
        ConfigError: as `load_config`, or it leaves the vocabulary open.
    """
    config = load_config(path)
    try:
        return resolve(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def preset_names() -> list[str]:
    """Names of the model shapes that come with the package, smallest first."""
    folder = resources.files("megatron_md") / "presets"
    sizes = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}

    def width(name: str) -> tuple[int, str]:
        shape = config_loader.parse_yaml(sizes[name].read_text(encoding="utf-8"), name)
        return shape["hidden"], name

    return sorted(sizes, key=width)


def _preset(name: str, source: str) -> dict[str, Any]:
    file = resources.files("megatron_md") / "presets" / f"{name}.yaml"
    if name not in preset_names():
        close = nearest(name, preset_names())
        raise ConfigError(f"{source}: model.preset {name!r} is unknown{close} (known: {', '.join(preset_names())})")
    shape = config_loader.parse_yaml(file.read_text(encoding="utf-8"), f"preset {name}")
    assert isinstance(shape, dict)
    return shape


def to_yaml(config: Config) -> str:
    """The config as YAML, which `load_config` reads back to an equal one, but for the secrets of URLs."""
    return config_loader.to_yaml(as_dict(config))


def explain() -> str:
    """Every key with its type, default and meaning, for `megatron-md train --help`."""
    return explain_keys(Config)

"""Configuration of a run: frozen dataclasses, filled from one YAML file and dotted overrides, strictly.

Every key carries its explanation (`megatron-md train --help` prints them all), its type and its bounds.
This module imports neither torch nor Megatron, so that a bad config is refused within a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_md.config import loader as config_loader
from megatron_md.config.data import CorpusConfig, DataConfig
from megatron_md.config.loader import ConfigError
from megatron_md.config.model import MegatronConfig, ModelConfig, ParallelConfig
from megatron_md.config.objective import ObjectiveConfig
from megatron_md.config.outputs import CheckpointConfig, LogConfig, SamplingConfig, ValidationConfig
from megatron_md.config.run import Config, ResolvedConfig, ResolvedModel, as_dict, resolve
from megatron_md.config.schema import explain as explain_keys
from megatron_md.config.training import BatchRampConfig, LRScheduleConfig, OptimizerConfig, ProfileConfig, TrainConfig
from megatron_md.messages import nearest

__all__ = [
    "BatchRampConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "CorpusConfig",
    "DataConfig",
    "LRScheduleConfig",
    "LogConfig",
    "MegatronConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfileConfig",
    "ResolvedConfig",
    "ResolvedModel",
    "SamplingConfig",
    "TrainConfig",
    "ValidationConfig",
    "as_dict",
    "config_from_mapping",
    "explain",
    "load_config",
    "load_resolved",
    "preset_names",
    "resolve",
    "to_yaml",
]


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

"""Configuration of a run: frozen dataclasses, filled from one YAML file and dotted overrides, strictly.

Every key carries its explanation (`megatron-md train --help` prints them all), its type and its bounds.
This module imports neither torch nor Megatron, so that a bad config is refused within a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_md import config_loader
from megatron_md.config_loader import ConfigError

__all__ = [
    "Config",
    "ConfigError",
    "as_dict",
    "config_from_mapping",
    "explain",
    "load_config",
    "preset_names",
    "to_yaml",
]

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def Doc(text: str) -> Any:
    """Attach the explanation of a key."""
    return Field(description=text)


Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True)
class ModelConfig:
    """The denoiser: a bidirectional transformer (RMSNorm, SwiGLU, no biases)."""

    __pydantic_config__ = STRICT

    preset: Annotated[str | None, Doc("named shape that the keys below override: tiny, 50m, 1b, 1b-aligned, 8b")] = None
    layers: Annotated[PositiveInt, Doc("transformer layers")] = 4
    hidden: Annotated[PositiveInt, Doc("width of the residual stream")] = 128
    heads: Annotated[PositiveInt, Doc("attention heads")] = 2
    kv_heads: Annotated[PositiveInt | None, Doc("key/value heads of grouped-query attention; heads if null")] = None
    head_dim: Annotated[PositiveInt | None, Doc("width of one head; hidden / heads if null")] = None
    ffn: Annotated[PositiveInt, Doc("width of the feed-forward layer (of each of its gate and up halves)")] = 344
    tied: Annotated[bool, Doc("share the embedding with the output layer")] = True
    vocab: Annotated[PositiveInt | None, Doc("vocabulary size; the tokenizer's if null")] = None
    max_length: Annotated[PositiveInt | None, Doc("longest sequence; data.seq_length if null")] = None
    position: Annotated[Literal["rope", "learned"], Doc("position encoding")] = "rope"
    rope_theta: Annotated[PositiveFloat, Doc("base of the rotary frequencies")] = 10000.0
    norm_eps: Annotated[PositiveFloat, Doc("epsilon of RMSNorm")] = 1e-5
    qk_norm: Annotated[bool, Doc("RMSNorm on queries and keys")] = False
    qkv_bias: Annotated[bool, Doc("biases on the query, key and value projections (Qwen2, Dream)")] = False
    init_std: Annotated[PositiveFloat, Doc("standard deviation of the initial weights")] = 0.02
    scaled_init: Annotated[bool, Doc("divide the init of output projections by sqrt(2 * layers)")] = True


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is split; data-parallel size is what remains of the world."""

    __pydantic_config__ = STRICT

    tensor: Annotated[PositiveInt, Doc("tensor-parallel size")] = 1
    sequence_parallel: Annotated[bool, Doc("split activations along the sequence between tensor-parallel ranks")] = (
        False
    )
    pipeline: Annotated[PositiveInt, Doc("pipeline-parallel size")] = 1
    virtual_pipeline: Annotated[PositiveInt, Doc("model chunks per pipeline rank (interleaved schedule)")] = 1
    first_stage_layers: Annotated[PositiveInt | None, Doc("layers of the first pipeline stage; even split if null")] = (
        None
    )
    last_stage_layers: Annotated[PositiveInt | None, Doc("layers of the last pipeline stage; even split if null")] = (
        None
    )
    context: Annotated[PositiveInt, Doc("context-parallel size")] = 1
    distributed_optimizer: Annotated[bool, Doc("shard optimizer state over data-parallel ranks")] = True
    overlap_grad_reduce: Annotated[bool, Doc("overlap the gradient reduction with the backward pass")] = False
    overlap_param_gather: Annotated[bool, Doc("overlap the parameter gather with the forward pass")] = False
    vocab_multiple: Annotated[PositiveInt, Doc("pad the vocabulary to a multiple of this times tensor")] = 1
    timeout_seconds: Annotated[PositiveFloat, Doc("collective timeout of the process groups")] = 600.0


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus of a mixture."""

    __pydantic_config__ = STRICT

    manifest: Annotated[str, Doc("manifest of its shards")]
    weight: Annotated[
        NonNegativeFloat | list[tuple[NonNegativeInt, NonNegativeFloat]],
        Doc("its share of the rows next to the others' weights; [[g, weight], ...] from row g of the run on"),
    ]
    name: Annotated[str | None, Doc("what messages call it; the manifest's path if null")] = None

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name or self.manifest

    def points(self) -> list[tuple[int, float]]:
        """From which row of the run on it has which weight."""
        return self.weight if isinstance(self.weight, list) else [(0, self.weight)]


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    __pydantic_config__ = STRICT

    train: Annotated[
        str | list[CorpusConfig] | None,
        Doc("manifest of the training shards; or a mixture: [{manifest: ..., weight: ..., name: ...}, ...]"),
    ] = None
    valid: Annotated[str | None, Doc("manifest of the validation shards")] = None
    tokenizer: Annotated[str | None, Doc("SentencePiece model, or tokenizer.json of Hugging Face")] = None
    seq_length: Annotated[PositiveInt, Doc("tokens per row (L)")] = 256
    window_shards: Annotated[PositiveInt, Doc("shards that are shuffled together (W)")] = 8
    prefetch: Annotated[NonNegativeInt, Doc("global batches prepared ahead by a background thread")] = 2
    cache_dir: Annotated[
        str | None, Doc("folder on a disk of the node for shards at URLs; megatron-md in the user's cache if null")
    ] = None
    cache_bytes: Annotated[PositiveInt, Doc("most bytes that the cache may hold")] = 20_000_000_000
    random_length_fraction: Annotated[
        Fraction, Doc("share of global batches whose rows are cut to one random length (LLaDA: 0.01)")
    ] = 0.0
    max_quarantined: Annotated[
        NonNegativeInt, Doc("damaged documents that a run goes on without; it stops when there are more")
    ] = 100

    def corpora(self) -> list[CorpusConfig]:
        """The training corpora; a single manifest is a mixture of one."""
        if self.train is None:
            return []
        return [CorpusConfig(self.train, 1.0)] if isinstance(self.train, str) else self.train


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised, and how the mask rate is drawn."""

    __pydantic_config__ = STRICT

    name: Annotated[str, Doc("masked_diffusion, masked_diffusion_sft, autoregressive, or one from imports")] = (
        "masked_diffusion"
    )
    mask_schedule: Annotated[
        str | dict[str, Any],
        Doc("law of the mask rate t: uniform:lo,hi | beta:a,b | point:t | a mapping for mixture, knots, curriculum"),
    ] = "uniform:0,1"
    weight: Annotated[
        Literal["elbo", "none", "realised"], Doc("weight of a row: 1/t, constant, or maskable/masked")
    ] = "elbo"
    importance: Annotated[bool, Doc("also divide by the schedule's density: unbiased full-range NELBO")] = False
    normalise: Annotated[
        Literal["maskable", "masked", "sequences"] | None,
        Doc("global count that the loss sum is divided by; null: the objective's own (maskable; sequences for SFT)"),
    ] = None
    mask_logit: Annotated[Literal["exclude", "keep"], Doc("may the mask token itself be predicted (LLaDA: keep)")] = (
        "exclude"
    )
    min_mask_rate: Annotated[float, Field(gt=0.0, lt=1.0, description="floor of t in training")] = 1e-3
    head_chunk: Annotated[PositiveInt, Doc("masked positions per chunk of the LM head and cross-entropy")] = 1024
    options: Annotated[dict[str, Any], Doc("keyword arguments of a third-party objective")] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class LRScheduleConfig:
    """Shape of the learning rate over steps: a pure function of the step."""

    __pydantic_config__ = STRICT

    name: Annotated[Literal["constant", "cosine", "wsd", "piecewise"], Doc("shape after the warm-up")] = "cosine"
    warmup_steps: Annotated[NonNegativeInt, Doc("steps of linear warm-up from 0")] = 0
    min_lr: Annotated[NonNegativeFloat, Doc("learning rate at the end (cosine, wsd)")] = 0.0
    decay_steps: Annotated[
        NonNegativeInt | None, Doc("wsd: steps of the final decay; cosine: length, train.steps if null")
    ] = None
    points: Annotated[
        list[tuple[Fraction, NonNegativeFloat]],
        Doc("piecewise: [fraction of train.steps, learning rate], linear in between (LLaDA's shape)"),
    ] = field(default_factory=list)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    __pydantic_config__ = STRICT

    lr: Annotated[PositiveFloat, Doc("peak learning rate")] = 3e-4
    lr_schedule: Annotated[LRScheduleConfig, Doc("learning-rate schedule")] = field(default_factory=LRScheduleConfig)
    beta1: Annotated[Momentum, Doc("Adam beta1")] = 0.9
    beta2: Annotated[Momentum, Doc("Adam beta2")] = 0.95
    eps: Annotated[PositiveFloat, Doc("Adam epsilon")] = 1e-8
    weight_decay: Annotated[NonNegativeFloat, Doc("decoupled weight decay; never on norms and biases")] = 0.1
    clip_grad: Annotated[NonNegativeFloat, Doc("largest global gradient norm; 0 turns clipping off")] = 1.0


@dataclass(frozen=True)
class BatchRampConfig:
    """Growth of the global batch size at the start of a run."""

    __pydantic_config__ = STRICT

    start: Annotated[PositiveInt, Doc("global batch size at step 0")]
    increment: Annotated[PositiveInt, Doc("rows added at each rise")]
    steps: Annotated[PositiveInt, Doc("steps over which the ramp rises to train.global_batch_size")]


@dataclass(frozen=True)
class ProfileConfig:
    """A window of steps recorded by torch.profiler into RUN/profile."""

    __pydantic_config__ = STRICT

    start: Annotated[NonNegativeInt, Doc("first profiled step")] = 10
    steps: Annotated[NonNegativeInt, Doc("profiled steps; 0 turns the profiler off")] = 0


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    __pydantic_config__ = STRICT

    steps: Annotated[PositiveInt, Doc("optimizer steps of the whole run")] = 400
    global_batch_size: Annotated[PositiveInt, Doc("rows per optimizer step over the whole job")] = 16
    micro_batch_size: Annotated[PositiveInt, Doc("rows per forward pass of one data-parallel rank")] = 8
    batch_ramp: Annotated[BatchRampConfig | None, Doc("batch-size ramp-up; none if null")] = None
    precision: Annotated[Literal["fp32", "bf16"], Doc("arithmetic of the model; weights are kept in fp32")] = "fp32"
    device: Annotated[Literal["auto", "cpu", "cuda"], Doc("auto takes CUDA where there is one")] = "auto"
    recompute: Annotated[Literal["none", "selective", "full"], Doc("activation recomputation")] = "none"
    deterministic: Annotated[bool, Doc("deterministic kernels only")] = False
    hang_timeout: Annotated[
        float,
        Field(
            gt=0.0,
            le=1e6,
            description="seconds without a step, validation or save after which a rank prints its stacks and ends",
        ),
    ] = 600.0
    profile: Annotated[ProfileConfig, Doc("profiler window")] = field(default_factory=ProfileConfig)


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is written, and what a start does with it."""

    __pydantic_config__ = STRICT

    every_steps: Annotated[NonNegativeInt, Doc("save interval; 0 saves at the end only")] = 100
    keep_last: Annotated[PositiveInt, Doc("newest checkpoints that are kept")] = 2
    resume: Annotated[Literal["auto", "never"], Doc("auto continues from RUN's newest complete checkpoint")] = "auto"


@dataclass(frozen=True)
class ValidationConfig:
    """Full-range validation NELBO during training."""

    __pydantic_config__ = STRICT

    every_steps: Annotated[NonNegativeInt, Doc("validation interval; 0 validates at the end only")] = 100
    sequences: Annotated[NonNegativeInt, Doc("validation rows; 0 turns validation off")] = 256
    seed: Annotated[int, Doc("seed of the validation masks")] = 4321
    rate_bins: Annotated[PositiveInt, Doc("bins of the mask rate in val_ce_by_rate")] = 10


@dataclass(frozen=True)
class LogConfig:
    """What is written about the run."""

    __pydantic_config__ = STRICT

    every_steps: Annotated[PositiveInt, Doc("steps per line of metrics.jsonl")] = 10
    tensorboard: Annotated[bool, Doc("write RUN/tensorboard")] = True
    wandb_project: Annotated[str | None, Doc("also log to this Weights & Biases project")] = None


@dataclass(frozen=True)
class MegatronConfig:
    """Fields passed on to megatron-core's own configs, checked against their field names."""

    __pydantic_config__ = STRICT

    transformer: Annotated[dict[str, Any], Doc("fields of TransformerConfig")] = field(default_factory=dict)
    ddp: Annotated[dict[str, Any], Doc("fields of DistributedDataParallelConfig")] = field(default_factory=dict)
    optimizer: Annotated[dict[str, Any], Doc("fields of OptimizerConfig")] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    __pydantic_config__ = STRICT

    run_dir: Annotated[str, Doc("directory of the run: config, metrics, checkpoints")] = "runs/default"
    seed: Annotated[
        int, Field(ge=0, lt=2**63, description="seed of the data order, the corruption and the initial weights")
    ] = 1234
    model: Annotated[ModelConfig, Doc("the denoiser")] = field(default_factory=ModelConfig)
    parallel: Annotated[ParallelConfig, Doc("parallel layout")] = field(default_factory=ParallelConfig)
    data: Annotated[DataConfig, Doc("corpus and tokenizer")] = field(default_factory=DataConfig)
    objective: Annotated[ObjectiveConfig, Doc("training objective")] = field(default_factory=ObjectiveConfig)
    optimizer: Annotated[OptimizerConfig, Doc("AdamW and its learning rate")] = field(default_factory=OptimizerConfig)
    train: Annotated[TrainConfig, Doc("the loop")] = field(default_factory=TrainConfig)
    checkpoint: Annotated[CheckpointConfig, Doc("saving and resuming")] = field(default_factory=CheckpointConfig)
    validation: Annotated[ValidationConfig, Doc("validation during training")] = field(default_factory=ValidationConfig)
    log: Annotated[LogConfig, Doc("logging")] = field(default_factory=LogConfig)
    megatron: Annotated[MegatronConfig, Doc("pass-through to megatron-core")] = field(default_factory=MegatronConfig)
    imports: Annotated[list[str], Doc("modules that register third-party schedules and objectives")] = field(
        default_factory=list
    )


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
        close = config_loader.nearest(name, preset_names())
        raise ConfigError([f"{source}: model.preset {name!r} is unknown{close} (known: {', '.join(preset_names())})"])
    shape = config_loader.parse_yaml(file.read_text(encoding="utf-8"), f"preset {name}")
    assert isinstance(shape, dict)
    return shape


def as_dict(config: Config) -> dict[str, Any]:
    """The resolved config as nested dictionaries."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, which `load_config` reads back to an equal one."""
    return config_loader.to_yaml(config)


def explain() -> str:
    """Every key with its type, default and meaning, for `megatron-md train --help`."""
    return config_loader.explain(Config)

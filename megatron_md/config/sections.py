"""The sections of a run's configuration: every key with its explanation, its type and its bounds.

Imports neither torch nor Megatron, like all that a config needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def Doc(text: str) -> Any:
    """Attach the explanation of a key."""
    return Field(description=text)


# Beyond any run, and within what products of a few of them can be computed with.
MOST = 10**15
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# What a list is made for every one of.
Listed = Annotated[int, Field(gt=0, le=10_000)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True)
class ModelConfig:
    """The denoiser: a bidirectional transformer (RMSNorm, SwiGLU, no biases)."""

    __pydantic_config__ = STRICT

    preset: Annotated[str | None, Doc("named shape that the keys below override: tiny, 50m, 1b, 1b-aligned, 8b")] = None
    layers: Annotated[Listed, Doc("transformer layers")] = 4
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

    tensor: Annotated[Listed, Doc("tensor-parallel size")] = 1
    sequence_parallel: Annotated[bool, Doc("split activations along the sequence between tensor-parallel ranks")] = (
        False
    )
    pipeline: Annotated[Listed, Doc("pipeline-parallel size")] = 1
    virtual_pipeline: Annotated[Listed, Doc("model chunks per pipeline rank (interleaved schedule)")] = 1
    first_stage_layers: Annotated[PositiveInt | None, Doc("layers of the first pipeline stage; even split if null")] = (
        None
    )
    last_stage_layers: Annotated[PositiveInt | None, Doc("layers of the last pipeline stage; even split if null")] = (
        None
    )
    context: Annotated[Listed, Doc("context-parallel size")] = 1
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
    document_attention: Annotated[
        Literal["full", "within_document"],
        Doc("what a token attends to: the whole row, or its own document in the row only"),
    ] = "full"
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
    right_shift: Annotated[
        bool, Doc("the output at a position predicts the token to its right (Dream, starts from causal models)")
    ] = False
    attention_annealing: Annotated[
        Fraction,
        Doc("share of the run over which attention grows from causal to bidirectional, for starts from causal models"),
    ] = 0.0
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
    spike_factor: Annotated[
        NonNegativeFloat | None,
        Doc("leave out an update whose loss is above this times the running median; 0 or null: only NaN and Inf"),
    ] = 5.0
    max_skipped: Annotated[
        NonNegativeInt, Doc("updates left out in a row after which the run returns to a checkpoint; 0: never")
    ] = 5
    max_rollbacks: Annotated[
        NonNegativeInt, Doc("such returns in the whole run; where one more would be due, the run fails")
    ] = 3
    check_replicas_every: Annotated[
        NonNegativeInt | None,
        Doc(
            "steps after which ranks compare what several of them hold, as before each save; null: then only; 0: never"
        ),
    ] = None
    profile: Annotated[ProfileConfig, Doc("profiler window")] = field(default_factory=ProfileConfig)


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is written, and what a start does with it."""

    __pydantic_config__ = STRICT

    every_steps: Annotated[NonNegativeInt, Doc("save interval in steps; 0 saves at the end only")] = 100
    every_minutes: Annotated[NonNegativeFloat, Doc("save interval in minutes as well; 0 turns it off")] = 0.0
    keep_last: Annotated[PositiveInt, Doc("newest checkpoints that are kept")] = 2
    keep_every: Annotated[NonNegativeInt, Doc("also keep those at multiples of this many steps; 0 keeps none")] = 0
    keep_best: Annotated[
        NonNegativeInt, Doc("also keep so many with the lowest val_nelbo, of those saved at a validated step")
    ] = 0
    asynchronous: Annotated[bool, Doc("write in the background while training goes on; costs a copy in memory")] = False
    on_error: Annotated[
        Literal["stop", "continue"], Doc("after a failed save: stop the run, or train on to the next one")
    ] = "stop"
    resume: Annotated[Literal["auto", "never"], Doc("auto continues from RUN's newest undamaged checkpoint")] = "auto"
    load: Annotated[
        str | None, Doc("another run or checkpoint that this run starts from while RUN has no checkpoint of its own")
    ] = None
    load_only: Annotated[
        Literal["model"] | None, Doc("model takes the weights of checkpoint.load only; null goes on where it stood")
    ] = None


@dataclass(frozen=True)
class ValidationConfig:
    """Full-range validation NELBO during training."""

    __pydantic_config__ = STRICT

    every_steps: Annotated[NonNegativeInt, Doc("validation interval; 0 validates at the end only")] = 100
    sequences: Annotated[NonNegativeInt, Doc("validation rows; 0 turns validation off")] = 256
    seed: Annotated[Seed, Doc("seed of the validation masks")] = 4321
    rate_bins: Annotated[Listed, Doc("bins of the mask rate in val_ce_by_rate")] = 10


@dataclass(frozen=True)
class SamplingConfig:
    """Texts that the model writes during training (RUN/samples.jsonl); `megatron-md generate` explains the sampler."""

    __pydantic_config__ = STRICT

    every_steps: Annotated[NonNegativeInt, Doc("sampling interval, and after the last step; 0 turns it off")] = 0
    prompts: Annotated[list[str], Doc("texts to continue, one sample each; an empty one starts from nothing")] = field(
        default_factory=lambda: [""]
    )
    length: Annotated[PositiveInt, Doc("tokens to generate")] = 64
    steps: Annotated[PositiveInt | None, Doc("denoising steps; one per token if null")] = None
    block: Annotated[PositiveInt | None, Doc("tokens per block, filled left to right; length if null")] = None
    strategy: Annotated[str, Doc("what a denoising step commits (docs/sampling.md)")] = "low_confidence"
    temperature: Annotated[NonNegativeFloat, Doc("0: the likeliest token")] = 0.0
    seed: Annotated[Seed, Doc("seed of the draws")] = 0


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

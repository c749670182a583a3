"""How it is trained and what a run writes, each section with its checks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from megatron_md.config.schema import STRICT, Doc, Fraction, Listed, Momentum, NonNegativeInt, PositiveInt, Seed

if TYPE_CHECKING:
    from megatron_md.config import Config


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

    def problems(self) -> Iterator[str]:
        """What these keys contradict in each other, a line for each."""
        shape = self.lr_schedule
        if shape.min_lr > self.lr:
            yield f"optimizer.lr_schedule.min_lr {shape.min_lr:g} is above optimizer.lr {self.lr:g}"
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
    epochs: Annotated[
        Annotated[float, Field(gt=0.0, le=1e6)] | None,
        Doc("passes over data.train in place of train.steps, which are counted from it, rounded up, and kept instead"),
    ] = None
    global_batch_size: Annotated[PositiveInt, Doc("rows per optimizer step over the whole job")] = 16
    micro_batch_size: Annotated[PositiveInt, Doc("rows per forward pass of one data-parallel rank")] = 8
    batch_ramp: Annotated[BatchRampConfig | None, Doc("batch-size ramp-up; none if null")] = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp8"],
        Doc(
            "arithmetic of the model, auto: bf16 on CUDA, fp32 elsewhere; fp8: products of the layers in fp8, the rest "
            "as bf16; the optimizer keeps its weights in fp32"
        ),
    ] = "auto"
    dropout: Annotated[
        Annotated[float, Field(ge=0.0, lt=1.0)],
        Doc(
            "chance that an element of the embeddings or of what a layer adds is dropped in training, for repeated data"
        ),
    ] = 0.0
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
    ema_decay: Annotated[
        float | None,
        Field(
            gt=0.0,
            lt=1.0,
            description="keep an average of the trained weights, of which min(ema_decay, (1+n)/(10+n)) stays at update "
            "n; null: none",
        ),
    ] = None
    gc_every: Annotated[
        NonNegativeInt,
        Doc(
            "steps after which all ranks collect Python's garbage together, and at no other time; 0: when Python likes"
        ),
    ] = 100
    profile: Annotated[ProfileConfig, Doc("profiler window")] = field(default_factory=ProfileConfig)

    def uses_bf16(self, device_type: str) -> bool:
        """Whether the model computes in bf16 on a device of this type (cpu or cuda)."""
        return self.precision in ("bf16", "fp8") or (self.precision == "auto" and device_type == "cuda")

    def settled(self, device_type: str) -> TrainConfig:
        """The same with its precision on a device of this type, which is what a run keeps of it."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bf16" if self.uses_bf16(device_type) else "fp32")

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in the run, a line for each; `run.check` counts the batches' rows."""
        if self.precision == "fp8":
            yield from self._fp8_problems(run)
        ramp, factor = self.batch_ramp, self.spike_factor
        if ramp is not None and ramp.start > self.global_batch_size:
            yield f"train.batch_ramp.start {ramp.start} is above train.global_batch_size {self.global_batch_size}"
        if ramp is not None and self.epochs is None and ramp.steps > self.steps:
            yield f"train.batch_ramp.steps {ramp.steps} is more than train.steps {self.steps}: the ramp would not end"
        if factor and factor <= 1.0:
            yield f"train.spike_factor {factor:g} would leave out ordinary updates: it must be above 1, or 0 for none"
        for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
            if self.ema_decay is not None and run.megatron.optimizer.get(name):
                yield f"train.ema_decay does not go with megatron.optimizer.{name}: leave one of them out"

    def _fp8_problems(self, run: Config) -> Iterator[str]:
        """What the kernels cannot split: they take matrices whose sides are multiples of 16."""
        if self.device == "cpu":
            yield "train.precision fp8 needs a CUDA device with Transformer Engine: set train.precision=bf16"
        model, layout = run.model, run.parallel
        rows = self.micro_batch_size * run.data.seq_length // layout.context
        split = layout.tensor if layout.sequence_parallel else 1
        sides = {
            "train.micro_batch_size x data.seq_length": (rows, split),
            "model.hidden": (model.hidden, 1),
            "model.ffn": (model.ffn, layout.tensor),
            "model.heads x model.head_dim": (model.heads * model.head_width, layout.tensor),
            "model.kv_heads x model.head_dim": (model.key_heads * model.head_width, layout.tensor),
        }
        for name, (size, parts) in sides.items():
            if size % (16 * parts):
                yield f"train.precision fp8 needs {name} on a rank to be a multiple of 16, got {size} / {parts}"
        if run.data.random_length_fraction:
            yield "train.precision fp8 takes rows of one length: set data.random_length_fraction=0"


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

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in the run, a line for each."""
        if self.load_only is not None and self.load is None:
            yield "checkpoint.load_only says what to take of checkpoint.load, which is not set"
        if self.keep_best and not run.validation.sequences:
            yield "checkpoint.keep_best chooses by val_nelbo, and validation.sequences 0 turns validation off"


@dataclass(frozen=True)
class ValidationConfig:
    """Full-range validation NELBO during training."""

    __pydantic_config__ = STRICT

    every_steps: Annotated[NonNegativeInt, Doc("validation interval; 0 validates at the end only")] = 100
    sequences: Annotated[NonNegativeInt, Doc("validation rows; 0 turns validation off")] = 256
    seed: Annotated[Seed, Doc("seed of the validation masks")] = 4321
    rate_bins: Annotated[Listed, Doc("bins of the mask rate in val_ce_by_rate")] = 10
    weights: Annotated[
        Literal["model", "ema"], Doc("what is validated (and kept as best): the weights, or their average")
    ] = "model"

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in the run, a line for each."""
        if self.weights == "ema" and run.train.ema_decay is None:
            yield "validation.weights ema needs an average of the weights: set train.ema_decay, such as 0.999"


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

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in the run, a line for each; `run.check` asks the sampler."""
        if not self.every_steps:
            return
        if run.data.tokenizer is None:
            yield (
                "sampling.every_steps needs data.tokenizer, to read prompts and to write texts; "
                "set it, or every_steps 0"
            )
        if not self.prompts:
            yield 'sampling.prompts is empty: give a prompt ("" starts from nothing), or set sampling.every_steps=0'
        if self.length > run.positions:
            yield f"sampling.length {self.length} exceeds the model's {run.positions} positions; shorten it"


@dataclass(frozen=True)
class LogConfig:
    """What is written about the run."""

    __pydantic_config__ = STRICT

    every_steps: Annotated[PositiveInt, Doc("steps per line of metrics.jsonl")] = 10
    tensorboard: Annotated[bool, Doc("write RUN/tensorboard")] = True
    wandb_project: Annotated[str | None, Doc("also log to this Weights & Biases project")] = None
    trackio_project: Annotated[str | None, Doc("also log to this Trackio project")] = None

    def problems(self) -> Iterator[str]:
        """What these keys need and is not there, a line for each."""
        for package, project in (("wandb", self.wandb_project), ("trackio", self.trackio_project)):
            if project is not None and importlib.util.find_spec(package) is None:
                yield (
                    f"log.{package}_project is set, but {package} is not installed: pip install {package}, "
                    "or leave the key out"
                )

"""What a run writes: checkpoints, validation, samples, logs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import NonNegativeFloat

from megatron_md.config.keys import STRICT, Doc, Listed, NonNegativeInt, PositiveInt, Seed

if TYPE_CHECKING:
    from megatron_md.config.run import Config


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

    def problems(self) -> Iterator[str]:
        """What these keys need and is not there, a line for each."""
        if self.wandb_project is not None and importlib.util.find_spec("wandb") is None:
            yield "log.wandb_project is set, but wandb is not installed: pip install wandb, or leave the key out"

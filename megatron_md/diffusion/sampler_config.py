"""How to generate, and every contradiction in it, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_md.diffusion.names import strategies
from megatron_md.errors import UserError

EosHandling = Literal["keep", "stop", "suppress"]
CacheName = Literal["auto", "none", "prefix", "dual"]


@dataclass(frozen=True)
class SamplerConfig:
    """How to generate.

    Attributes:
        length: tokens to generate after a prompt; for `infill` the length of the canvas.
        steps: denoising steps over all blocks; one per token if None. `threshold` and `factor` take it as the most.
        block: tokens per block, filled from left to right one block after the other; `length` if None.
        strategy: name of a strategy: which proposals a step commits.
        temperature: 0 takes the likeliest token, 1 samples from the denoiser's distribution (MDLM's sampler is
            `ancestral` at 1).
        top_p: sample from the likeliest tokens that together have this probability; needs a temperature.
        guidance: w of classifier-free guidance against the canvas without its given tokens; 0 is off, more doubles
            the forward passes.
        threshold: probability from which the strategy `threshold` commits.
        factor: f of the strategy `factor`.
        eos: `keep` treats it as any token; `stop` ends a row at an `<eos>`, or another token that ends a turn, with
            nothing open before it and fills what follows with `<eos>`; `suppress` never generates `<eos>` (LLaDA's
            `logits_eos_inf`).
        confidence_eos_eot_inf: commit positions whose proposal is `<eos>`, or another token that ends a turn, after all
            others (LLaDA's option of this name). Confidences are then without those tokens.
        seed: of all random draws.
        cache: keys and values that are kept between steps: `auto` all that is exact (of a block model everything before
            the block, of others nothing), `none`; `prefix` and `dual`, of denoisers that see whole rows, what lies
            before the block or all around it as it was when the block began (Fast-dLLM; approximate).
    """

    length: int
    steps: int | None = None
    block: int | None = None
    strategy: str = "low_confidence"
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0
    guidance: float = 0.0
    threshold: float = 0.9
    factor: float = 1.0
    eos: EosHandling = "keep"
    confidence_eos_eot_inf: bool = False
    cache: CacheName = "auto"

    def __post_init__(self) -> None:
        for key, value in (("length", self.length), ("steps", self.total_steps), ("block", self.block_size)):
            if value < 1:
                raise UserError(f"{key} must be at least 1, got {value}")
        self._check_division()
        self._check_numbers()
        if self.eos not in get_args(EosHandling):
            raise UserError(f"eos must be one of {', '.join(get_args(EosHandling))}, got {self.eos!r}")
        if self.cache not in get_args(CacheName):
            raise UserError(f"cache must be one of {', '.join(get_args(CacheName))}, got {self.cache!r}")
        strategies.check(self.strategy)

    def _check_division(self) -> None:
        if self.block_size > self.length:
            raise UserError(
                f"block {self.block_size} is longer than length {self.length}; make it at most {self.length}"
            )
        if self.length % self.block_size:
            raise UserError(f"length {self.length} is not a multiple of block {self.block_size}")
        if self.total_steps % self.blocks:
            raise UserError(
                f"steps {self.total_steps} is not a multiple of the {self.blocks} blocks (length {self.length} / block "
                f"{self.block_size})"
            )
        if self.strategy == "first_hitting" and self.total_steps != self.length:
            raise UserError(
                f"first_hitting commits one token per step: steps must be the length {self.length}, got "
                f"{self.total_steps}"
            )

    def _check_numbers(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be 0 or a positive number, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_p < 1.0 and self.temperature == 0.0:
            raise UserError(f"top_p {self.top_p} changes nothing at temperature 0; set a temperature or top_p 1")
        if not 0.0 <= self.guidance < math.inf:
            raise UserError(f"guidance must be 0 or a positive number, got {self.guidance}")
        if not 0.0 < self.threshold <= 1.0:
            raise UserError(f"threshold must be in (0, 1], got {self.threshold}")
        if not 0.0 < self.factor < math.inf:
            raise UserError(f"factor must be a positive number, got {self.factor}")

    @property
    def total_steps(self) -> int:
        """Steps over all blocks."""
        return self.length if self.steps is None else self.steps

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.length if self.block is None else self.block

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.length // self.block_size


def check_fits(prompt_length: int, length: int, max_length: int) -> None:
    """Check that prompt and answer fit into the model's context.

    Raises:
        UserError: they do not.
    """
    if prompt_length + length > max_length:
        raise UserError(
            f"the prompt's {prompt_length} tokens and length {length} exceed the model's {max_length} positions; "
            "shorten the prompt or the length"
        )

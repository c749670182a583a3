"""How requests of a harness are answered, without torch: the estimator of likelihoods, the sampler of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_md.diffusion.conditional import ConditionalEstimator
from megatron_md.diffusion.sampler_config import SamplerConfig
from megatron_md.errors import UserError

DEFAULT_LENGTH = 256  # the harness' own default for models that are not told

# What LLaDA's published evaluation calls settings of ours that have another name.
PUBLISHED_NAMES = {
    "mc_num": "draws",
    "cfg": "guidance",
    "gen_length": "length",
    "block_length": "block",
    "remasking": "strategy",
}


@dataclass(frozen=True)
class HarnessSettings:
    """How requests are answered.

    Attributes:
        method: `monte_carlo` or `left_to_right`; a causal run is always scored exactly.
        draws: masked copies of an answer under `monte_carlo`; one suffices for an answer of one token.
        seed: of the masks and of sampling.
        length: tokens of the canvas that is generated; the task's `max_gen_toks` if None.
        steps: denoising steps; one per token if None.
        block: tokens per block, from left to right; the whole canvas if None.
        strategy: of the sampler.
        temperature: of the sampler; the task's own if None.
        guidance: classifier-free guidance, of answers' likelihoods and of the sampler.
        logits_eos_inf: never generate `<eos>` (LLaDA's option of this name).
        confidence_eos_eot_inf: generate what ends a text after all else (LLaDA's option of this name).
        is_check_greedy: where a question has a single continuation, decode greedily too, and see whether that gives it
            (LLaDA's option of this name).
        template: chat template, as `ChatTemplate.of` takes it; the tokenizer's own if None.
    """

    method: str = "monte_carlo"
    draws: int = 128
    seed: int = 0
    length: int | None = None
    steps: int | None = None
    block: int | None = None
    strategy: str = "low_confidence"
    temperature: float | None = None
    guidance: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    is_check_greedy: bool = True
    template: str | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> HarnessSettings:
        """From a harness' model arguments, under our names or those of LLaDA's published evaluation.

        Raises:
            UserError: an argument is unknown, or is there under both names.
        """
        keys: dict[str, Any] = {}
        for name, value in arguments.items():
            key = PUBLISHED_NAMES.get(name, name)
            if key not in cls.__dataclass_fields__:
                known = ", ".join([*cls.__dataclass_fields__, *PUBLISHED_NAMES])
                raise UserError(f"model_args: unknown {name} (known: run, tensor, pipeline, trust, {known})")
            if key in keys:
                raise UserError(f"model_args: {key} is there twice, under two names; leave one out")
            keys[key] = value
        return cls(**keys)

    def estimator(self, *, causal: bool) -> ConditionalEstimator:
        """The estimator of log p(answer | prompt).

        Raises:
            UserError: there is none of that name, or it takes no such number of draws or guidance.
        """
        if self.method not in ("monte_carlo", "left_to_right"):
            raise UserError(f"method {self.method!r}: unknown; use monte_carlo or left_to_right")
        if self.draws < 1:
            raise UserError(f"draws must be at least 1, got {self.draws}")
        name: Any = "autoregressive" if causal else self.method
        minibatch = math.gcd(self.draws, 16)
        return ConditionalEstimator(name, draws=self.draws, minibatch=minibatch, seed=self.seed, guidance=self.guidance)

    def sampler(self, request: dict[str, Any], max_length: int) -> SamplerConfig:
        """The sampler for a request's generation arguments.

        Raises:
            UserError: no canvas of that kind can be filled, or it leaves no room for a prompt.
        """
        length = self.length or int(request.get("max_gen_toks", DEFAULT_LENGTH))
        length += -length % (self.block or 1)
        if length >= max_length:
            raise UserError(
                f"{length} tokens to generate leave no room for a prompt in the model's {max_length} positions; "
                "give a smaller --length"
            )
        temperature = float(request.get("temperature") or 0.0) if request.get("do_sample") else 0.0
        temperature = temperature if self.temperature is None else self.temperature
        top_p = float(request.get("top_p") or 1.0) if temperature else 1.0
        return SamplerConfig(
            length=length,
            steps=self.steps,
            block=self.block,
            strategy=self.strategy,
            temperature=temperature,
            top_p=top_p,
            guidance=self.guidance,
            eos="suppress" if self.logits_eos_inf else "stop",
            confidence_eos_eot_inf=self.confidence_eos_eot_inf,
            seed=self.seed,
        )

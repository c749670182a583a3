"""What is to be sampled during training, checked before a model is built."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_md.config import Config
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.sampler_config import SamplerConfig, check_fits
from megatron_md.errors import UserError


@dataclass(frozen=True)
class SampleRequest:
    """A prompt with its tokens, and how to continue it."""

    prompt: str
    tokens: list[int]
    config: SamplerConfig


def sampler_config(config: Config) -> SamplerConfig:
    """The sampler as the keys of `sampling` say.

    Raises:
        UserError: they contradict each other.
    """
    keys = config.sampling
    return SamplerConfig(
        length=keys.length,
        steps=keys.steps,
        block=keys.block,
        strategy=keys.strategy,
        temperature=keys.temperature,
        seed=keys.seed,
    )


def sample_requests(config: Config, tokenizer: Tokenizer) -> list[SampleRequest]:
    """The prompts of `sampling`, checked.

    A canvas must be a multiple of the slices that the layout cuts rows into: the length is rounded up to that.

    Raises:
        UserError: a prompt does not fit into the context, or no canvas of a fit length can be sampled.
    """
    sampler = sampler_config(config)
    requests = []
    for prompt in config.sampling.prompts:
        try:
            tokens = tokenizer.encode(prompt).tolist()
            if config.objective.right_shift and not tokens:
                tokens = [tokenizer.eos_token_id]  # nothing predicts a row's first token
            rounded = _rounded(sampler, len(tokens), config)
            check_fits(len(tokens), rounded.length, config.positions)
        except ValueError as error:
            raise UserError(f"sampling.prompts, {prompt!r}: {error}") from None
        requests.append(SampleRequest(prompt, tokens, rounded))
    return requests


def _rounded(sampler: SamplerConfig, prompt_length: int, config: Config) -> SamplerConfig:
    multiple, size = config.parallel.row_slices, config.objective.final_block_size
    if size is not None and size % multiple == 0:
        return sampler  # a block model's canvas is whole blocks
    length = sampler.length + -(prompt_length + sampler.length) % multiple
    try:
        return replace(sampler, length=length)
    except ValueError:
        raise UserError(
            f"parallel.{'context' if config.parallel.context > 1 else 'sequence_parallel'} cuts rows into {multiple} "
            "slices, which prompt and text must be a multiple of, and "
            f"sampling.length {sampler.length} cannot become {length} with these sampling.steps and sampling.block; "
            "leave both out"
        ) from None

"""A model on any layout as a denoiser for the samplers: what generation, evaluation and sampling in training share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_md.diffusion.sampler import OnStep, Sample, sample
from megatron_md.diffusion.sampler_config import SamplerConfig
from megatron_md.train.step import Stepper


class StepperDenoiser:
    """Calls a model: tokens [B, L] -> logits fp32 [B, L, V], -inf for tokens that it never predicts.

    A causal model predicts each position from those to its left, so that filling a canvas in blocks of one token is its
    own left-to-right sampling. Every rank of a replica calls it with the same tokens.
    """

    def __init__(self, stepper: Stepper, *, mask_token_id: int, max_length: int) -> None:
        self.stepper, self.max_length = stepper, max_length
        self.causal, self.right_shift = stepper.objective.causal, stepper.right_shift
        self.device = stepper.world.device
        # What a causal model of ours reads first, as in training; a right-shifted one reads the row itself.
        self._bos_token_id = mask_token_id if self.causal and not self.right_shift else None

    def __call__(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Logits at every position."""
        return self.stepper.logits(tokens_BL, bos_token_id=self._bos_token_id)


def fill(
    denoiser: StepperDenoiser,
    prompts_BP: Sequence[Sequence[int]],
    config: SamplerConfig,
    *,
    mask_token_id: int,
    eos_token_id: int,
    on_step: OnStep | None = None,
    seeds: Sequence[int] | None = None,
) -> Sample:
    """Continue prompts of one length; a causal model fills one token after the other, whatever the steps and strategy.

    Where nothing predicts a row's first token (`right_shift`) an `<eos>` stands for an empty prompt.

    Raises:
        ValueError: as for `sampler.sample`.
    """
    if denoiser.right_shift:
        prompts_BP = [prompt or [eos_token_id] for prompt in prompts_BP]
    if denoiser.causal:
        config = replace(config, steps=config.length, block=1, strategy="low_confidence")
    prompts = torch.tensor([list(prompt) for prompt in prompts_BP], dtype=torch.int64, device=denoiser.device)
    return sample(
        denoiser,
        prompts,
        config,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        max_length=denoiser.max_length,
        on_step=on_step,
        seeds=seeds,
    )

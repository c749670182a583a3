"""Texts by a model: prompts are continued or filled in by whichever sampling the model is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_md.diffusion import sampler
from megatron_md.diffusion.sampler import OnStep, Sample, SamplerStep
from megatron_md.diffusion.sampler_config import SamplerConfig, check_fits
from megatron_md.errors import UserError
from megatron_md.train.decoder import Decoder
from megatron_md.train.inference import Inference

Tokens = Sequence[int]


def fill(
    denoiser: Inference,
    prompts: Sequence[Tokens],
    config: SamplerConfig,
    *,
    mask_token_id: int,
    eos_token_id: int,
    eot_token_ids: Tokens = (),
    on_step: OnStep | None = None,
    seeds: Sequence[int] | None = None,
) -> Sample:
    """Continue prompts; the last `config.length` tokens of each row of the sample are what was written.

    A causal model fills one token after the other, whatever the steps and strategy. A block model fills its own blocks
    and takes prompts of different lengths, with `<eos>` before the shorter ones in the sample; others take prompts of
    one length. Where nothing predicts a row's first token (`right_shift`) an `<eos>` stands for an empty prompt.

    Raises:
        UserError: as for `sampler.sample` and `Decoder`, or keys of the sampler that mean nothing to a block model.
    """
    size = denoiser.block_size
    check_block_model(size, config)
    decoder = Decoder(denoiser, config.cache)
    tokens = {"mask_token_id": mask_token_id, "eos_token_id": eos_token_id}
    if size is not None:
        check_fits(max(map(len, prompts)), config.length, denoiser.max_length)
        canvas = _BlockCanvas(prompts, config.length, size, denoiser.max_length, **tokens)
        found = sampler.fill_model_blocks(
            decoder,
            torch.tensor(canvas.rows, dtype=torch.int64, device=denoiser.device),
            replace(config, block=None),
            size,
            **tokens,
            eot_token_ids=eot_token_ids,
            on_step=None if on_step is None else lambda step: on_step(canvas.shown(step)),
            seeds=seeds,
        )
        return canvas.wanted(found)
    if denoiser.right_shift:
        prompts = [prompt or [eos_token_id] for prompt in prompts]
    if denoiser.causal:
        config = replace(config, steps=config.length, block=1, strategy="low_confidence")
    return sampler.sample(
        decoder,
        torch.tensor([list(prompt) for prompt in prompts], dtype=torch.int64, device=denoiser.device),
        config,
        **tokens,
        eot_token_ids=eot_token_ids,
        max_length=denoiser.max_length,
        on_step=on_step,
        seeds=seeds,
    )


def check_block_model(size: int | None, config: SamplerConfig) -> None:
    """Refuse what a block model cannot do.

    Raises:
        UserError: it is one (`size` is not None), and was asked to.
    """
    if size is None:
        return
    if config.block not in (None, size):
        raise UserError(f"block {config.block}: the model's own blocks are of {size} tokens; leave block out")
    if config.guidance:
        raise UserError("guidance needs logits without the prompt, which a block model was not trained for; set 0")
    if config.cache in ("prefix", "dual"):
        raise UserError(f"cache {config.cache}: a block model keeps all exactly; leave it out, or set none")


class _BlockCanvas:
    """Rows for a block model: prompts from the first place on, then whole blocks to be filled.

    Whole blocks, whatever is wanted of the last: so a text does not depend on the lengths of the others. What lies
    behind a row's last block is not open, so that nothing is computed for it.

    Attributes:
        rows: token ids.
    """

    def __init__(
        self, prompts: Sequence[Tokens], length: int, size: int, most: int, *, mask_token_id: int, eos_token_id: int
    ) -> None:
        if any(mask_token_id in prompt for prompt in prompts):
            raise UserError(f"the prompt contains the mask token ({mask_token_id})")
        self._lengths = [len(prompt) + length for prompt in prompts]
        self._filler = eos_token_id
        ends = [min(-(-wanted // size) * size, most) for wanted in self._lengths]
        self.rows = [
            [*prompt, *[mask_token_id] * (end - len(prompt)), *[eos_token_id] * (max(ends) - end)]
            for prompt, end in zip(prompts, ends, strict=True)
        ]

    def wanted(self, found: Sample) -> Sample:
        """The sample of prompts and texts, which end together."""
        return replace(
            found,
            tokens_BL=self._flushed(found.tokens_BL, self._filler),
            fixed_step_BL=self._flushed(found.fixed_step_BL, 0),
        )

    def shown(self, step: SamplerStep) -> SamplerStep:
        """A step of it."""
        return replace(
            step,
            tokens_BL=self._flushed(step.tokens_BL, self._filler),
            is_committed_BL=self._flushed(step.is_committed_BL, 0),
            probability_BL=self._flushed(step.probability_BL, 0),
        )

    def _flushed(self, table_BL: torch.Tensor, filler: int) -> torch.Tensor:
        width = max(self._lengths)
        rows = zip(table_BL, self._lengths, strict=True)
        return torch.stack([torch.nn.functional.pad(row[:own], (width - own, 0), value=filler) for row, own in rows])

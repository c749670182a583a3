"""Batches of canvases, shared between data-parallel ranks: what all that generates does it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_md.diffusion.sampler import OnStep, Sample, SamplerConfig, sample
from megatron_md.evaluate.load import LoadedDenoiser
from megatron_md.parallel import World

Job = TypeVar("Job")
Result = TypeVar("Result")


def shared(world: World, jobs: Sequence[Job], work: Callable[[Job], Result]) -> list[Result]:
    """`[work(job) for job in jobs]` on every rank, each data-parallel rank doing its share; every rank calls this.

    The ranks of one share call `work` on the same jobs in the same order.
    """
    mine = {number: work(jobs[number]) for number in range(world.data_rank, len(jobs), world.data_size)}
    if world.data_size > 1:
        parts: list[dict[int, Result] | None] = [None] * world.size
        dist.all_gather_object(parts, mine)
        for part in parts:
            mine |= part or {}
    return [mine[number] for number in range(len(jobs))]


def fill(
    denoiser: LoadedDenoiser,
    prompts_BP: Sequence[Sequence[int]],
    config: SamplerConfig,
    *,
    mask_token_id: int,
    eos_token_id: int,
    on_step: OnStep | None = None,
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
    )

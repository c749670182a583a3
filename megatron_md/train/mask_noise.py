"""Noise on the embeddings of masked tokens, while a model that never saw a mask token learns what it is.

A new token's embedding is the same vector at every masked position, and means nothing to a causal model's layers;
LLaDA2.0 (arXiv 2512.15745) adds independent Gaussian noise to the embeddings of masked tokens as its conversion begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_md.batch import Int64Array, RowNoise
from megatron_md.config import Config
from megatron_md.diffusion.corruption import random_words


def row_noise(config: Config, progress: float, sample_index_B: Int64Array) -> RowNoise | None:
    """The noise of rows at `progress` of the run, which falls to 0 at `objective.mask_noise.until`; then None."""
    keys = config.objective.mask_noise
    if keys is None or progress >= keys.until:
        return None
    seeds = (int(random_words(config.seed, "mask_noise", (g,), 1)[0]) >> 1 for g in sample_index_B.tolist())
    return RowNoise(keys.std * (1.0 - progress / keys.until), tuple(seeds))


class MaskNoise:
    """Adds a micro-batch's noise to what a model's embedding gives."""

    def __init__(self, embedding: torch.nn.Module, mask_token_id: int, *, sequence_parallel: bool) -> None:
        self._rows: RowNoise | None = None
        self._mask_token_id, self._sequence_parallel = mask_token_id, sequence_parallel
        embedding.register_forward_hook(self._add, with_kwargs=True)

    @contextmanager
    def of(self, rows: RowNoise | None) -> Iterator[None]:
        """The noise that a forward pass in this context gets."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def _add(self, embedding: Any, args: tuple[Any, ...], keys: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
        """To [L, B, H] of this rank's slice, the noise of the same places of whole rows."""
        if self._rows is None:
            return hidden
        tokens_BL = keys["input_ids"] if "input_ids" in keys else args[0]
        slices, number = (
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )
        is_masked_LB = (tokens_BL == self._mask_token_id).t()
        if self._sequence_parallel:
            ranks, rank = (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_tensor_model_parallel_rank(),
            )
            slices, number = slices * ranks, number * ranks + rank
            is_masked_LB = is_masked_LB.chunk(ranks)[rank]
        whole = (slices * len(hidden), hidden.shape[2])
        noise = [_normal(seed, whole, hidden).chunk(slices)[number] for seed in self._rows.seeds]
        return hidden + self._rows.std * is_masked_LB[..., None] * torch.stack(noise, dim=1)


def _normal(seed: int, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)

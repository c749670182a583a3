"""Random numbers of dropout, which follow from the seed and the step alone."""

from __future__ import annotations

import hashlib

import torch
from megatron.core import parallel_state


def seed_dropout(seed: int, first_row: int, data_rank: int) -> None:
    """Let the dropout of a step follow from the seed and the step alone, so that a resumed run drops the same.

    Tensor-parallel ranks must drop the same of the inputs that they share.
    """
    places = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_context_parallel_rank())
    text = f"{seed}/dropout/{first_row}/{data_rank}/{places}"
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1)

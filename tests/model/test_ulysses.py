"""Attention over slices of rows against the same attention in one process: values and gradients, on three real ranks.

Three do not share two key heads without repeating them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_md.config import Config, ParallelConfig
from megatron_md.model.attention import SDPACoreAttention, additive_mask, packed_documents
from tests.ranks import run_ranks
from tests.small_run import CONFIG, variant

RANKS, LENGTH, ROWS, HEADS, WIDTH = 3, 12, 2, 6, 4
DOCUMENTS = [np.array(cuts, dtype=np.int32) for cuts in ([0, 5, 6, 12], [0, 12])]


@dataclass(frozen=True)
class Case:
    kv_heads: int = 2
    causal: bool = False
    documents: bool = False
    hidden: bool = False


CASES = {
    "one key head": Case(1),
    "two key heads": Case(2),
    "three key heads": Case(3),
    "a key head per query": Case(6),
    "causal": Case(causal=True),
    "documents": Case(documents=True),
    "hidden pairs": Case(hidden=True),
}


def attend(config: Config, group: Any) -> dict[str, list[torch.Tensor]]:
    """What attention gives, and the gradients of query, key and value, for each case: of this rank's slice."""
    from megatron_md import parallel
    from megatron_md.model.build import transformer_config

    found = {}
    with parallel.session(config) as world:
        own = slice(*(LENGTH // world.size * edge for edge in (world.rank, world.rank + 1)))
        for name, case in CASES.items():
            kind = AttnMaskType.causal if case.causal else AttnMaskType.no_mask
            attention = SDPACoreAttention(
                transformer_config(config, world.device), 1, kind, "self", rotary_base=100.0, pg_collection=group()
            )
            draw = torch.Generator().manual_seed(0)

            def random(*shape: int, draw: torch.Generator = draw) -> torch.Tensor:
                return torch.randn(LENGTH, ROWS, *shape, generator=draw, dtype=torch.float64)[own]

            inputs = [random(heads, WIDTH).requires_grad_() for heads in (HEADS, case.kv_heads, case.kv_heads)]
            hidden = additive_mask(torch.ones(LENGTH, LENGTH).triu(2).bool(), torch.float64) if case.hidden else None
            documents = packed_documents(DOCUMENTS, world.device) if case.documents else None
            context = attention(*inputs, hidden, packed_seq_params=documents)
            gradients = torch.autograd.grad((context * random(HEADS * WIDTH)).sum(), inputs)
            found[name] = [x.detach() for x in (context, *gradients)]
    return found


def context_group() -> Any:
    from megatron.core import parallel_state

    return SimpleNamespace(cp=parallel_state.get_context_parallel_group())


def no_group() -> None:
    """Where rows are whole, attention asks for no group."""


@pytest.mark.distributed
def test_slices_of_rows_attend_like_whole_rows() -> None:
    whole = run_ranks(attend, 1, CONFIG, no_group)[0]
    ranks = run_ranks(attend, RANKS, variant(parallel={"context": RANKS}), context_group)
    for name in CASES:
        for number, expected in enumerate(whole[name]):
            got = torch.cat([rank[name][number] for rank in ranks])
            torch.testing.assert_close(
                got, expected, msg=lambda text, name=name, number=number: f"{name} {number} {text}"
            )


def exchange(config: Config) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Numbers that tell their position and head, as `whole_rows` gives them, and back again."""
    from megatron.core import parallel_state

    from megatron_md import parallel
    from megatron_md.model.ulysses import own_slice, whole_rows

    with parallel.session(config) as world:
        group, own = parallel_state.get_context_parallel_group(), 2
        position_L = torch.arange(own) + own * world.rank
        number = 100 * position_L[:, None] + torch.arange(4)
        x_LBHD = number[:, None, :, None].float().expand(own, ROWS, 4, WIDTH)
        query, shared, _ = whole_rows(x_LBHD, x_LBHD[:, :, :1], x_LBHD[:, :, :1], group)
        _, key, value = whole_rows(x_LBHD, x_LBHD[:, :, :2], x_LBHD[:, :, 2:], group)
        assert query.shape == (4, ROWS, 2, WIDTH)
        back = own_slice(query.flatten(2), WIDTH, group)
        torch.testing.assert_close(back, x_LBHD.flatten(2), rtol=0, atol=0)
        return [x[:, 0, :, 0] for x in (query, shared, key, value)]


@pytest.mark.distributed
def test_a_rank_gets_whole_rows_of_its_heads_and_of_the_key_heads_that_they_ask() -> None:
    position_L = 100.0 * torch.arange(4)[:, None]
    for rank, found in enumerate(run_ranks(exchange, 2, Config(parallel=ParallelConfig(context=2)))):
        expected = (position_L + torch.arange(2) + 2 * rank, position_L, position_L + rank, position_L + 2 + rank)
        for got, heads in zip(found, expected, strict=True):
            torch.testing.assert_close(got, heads, rtol=0, atol=0)

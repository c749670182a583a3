"""Attention of block models (Arriola et al. 2025, arXiv 2503.09573), exact and without a mask over all pairs.

Training rows are [x_t, x_0] of L tokens each: a token of x_t sees its own block of x_t and the blocks of x_0 before it;
one of x_0 sees x_0 up to its own block (or, where the clean half is trained autoregressively, up to itself). On CUDA
that is FlexAttention, which visits the tiles that are seen; elsewhere the queries of a run of blocks share their keys,
and nothing is computed for blocks that none of them sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_md.batch import Int32Array

RUN = 128  # queries that share their keys, where blocks are smaller

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass
class BlockRows(PackedSeqParams):
    """What the rows of a micro-batch are, as megatron-core's models hand it on to the core attention.

    Attributes:
        block_size: S; blocks divide the text from its first token on.
        length: L, the tokens of text.
        copies: 2: rows are [x_t, x_0]; 1: they are the text, finished up to some block and masked from there on.
        causal_until: tokens of clean text before this one see nothing to their right, not even in their block.
        document_BL: the document of each token in its row, of which attention sees no other; None: all of the row.
    """

    block_size: int = 0
    length: int = 0
    copies: int = 2
    causal_until: int = 0
    document_BL: torch.Tensor | None = None
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False)
    _tiles: Any = field(default=None, repr=False)

    def sees(self, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether the token at place `query` of row `row` sees the one at place `key`; all three broadcast."""
        clean_from = self.length * (self.copies - 1)
        is_noisy_query, is_noisy_key = query < clean_from, key < clean_from
        query_at, key_at = query % self.length, key % self.length
        query_block, key_block = query_at // self.block_size, key_at // self.block_size
        is_before, is_own = key_block < query_block, key_block == query_block
        is_own = is_own & ~(is_noisy_query ^ is_noisy_key)  # torch 2.11 and 2.13 compile no == of booleans
        if self.causal_until:
            is_own = is_own & (is_noisy_query | (query_at >= self.causal_until) | (key_at <= query_at))
        is_seen = (is_before & ~is_noisy_key) | is_own
        if self.document_BL is None:
            return is_seen
        return is_seen & (self.document_BL[row, query_at] == self.document_BL[row, key_at])

    def mask(self, query: torch.Tensor, key: torch.Tensor, name: Any) -> torch.Tensor:
        """`sees` for all pairs of these places, [B or 1, 1, queries, keys]; layers share it by its name."""
        if name not in self._masks:
            rows = 1 if self.document_BL is None else len(self.document_BL)
            row = torch.arange(rows, device=query.device)[:, None, None, None]
            self._masks[name] = self.sees(row, query[:, None], key[None]).expand(rows, 1, -1, -1)
        return self._masks[name]

    def tiles(self, device: torch.device) -> Any:
        """`sees` as a `BlockMask` of FlexAttention; layers share it."""
        if self._tiles is None:
            places = self.copies * self.length
            rows = None if self.document_BL is None else len(self.document_BL)
            tiles_of = _flex()[1]
            self._tiles = tiles_of(lambda b, h, q, k: self.sees(b, q, k), rows, None, places, places, device=device)
        return self._tiles


def documents_of(cu_seqlens: Sequence[Int32Array], length: int, device: torch.device) -> torch.Tensor:
    """`BlockRows.document_BL` of rows of L tokens with the boundaries of their documents from 0 to L."""
    numbers = [np.searchsorted(cuts, np.arange(length), side="right") for cuts in cu_seqlens]
    return torch.from_numpy(np.stack(numbers)).to(device)


def attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: BlockRows, attend: Attend, scale: float
) -> torch.Tensor:
    """Attention of rows of a block model.

    Args:
        query: [copies * L, B, heads, d], positions applied.
        key: [copies * L, B, kv_heads, d].
        value: as key.
        rows: what sees what.
        attend: softmax attention of queries to keys, of which a boolean mask [B or 1, 1, queries, keys] says what is
            seen; None: all.
        scale: of the scores, where `attend` is not asked.

    Returns:
        [copies * L, B, heads, d].
    """
    if query.is_cuda:
        return attend_by_tiles(query, key, value, rows, scale)
    return attend_by_runs(query, key, value, rows, attend)


def attend_by_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: BlockRows, scale: float
) -> torch.Tensor:
    """`attend_in_blocks` by FlexAttention."""
    heads_first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
    attended: torch.Tensor = _flex()[0](
        *heads_first, block_mask=rows.tiles(query.device), scale=scale, enable_gqa=key.shape[2] != query.shape[2]
    )
    return attended.permute(2, 0, 1, 3)


@lru_cache(maxsize=1)
def _flex() -> tuple[Any, Any]:
    """FlexAttention and its masks, compiled: as they come they would hold all pairs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def attend_by_runs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: BlockRows, attend: Attend
) -> torch.Tensor:
    """`attend_in_blocks` by `attend`, a run of blocks at a time.

    The gradient of `split` is put together once; that of a slice for each run would be a whole tensor.
    """
    size, run = rows.block_size, rows.block_size * max(1, RUN // rows.block_size)
    place = torch.arange(len(query), device=query.device)
    # Runs of x_t (none in rows of one copy) and of x_0: places, queries, keys and values of each.
    tables = [[half.split(run) for half in x.split(rows.length)] for x in (place, query, key, value)]
    noisy, clean = ([list(zip(*half, strict=True)) for half in zip(*tables, strict=True)] + [[]])[:2]
    if rows.copies == 1:
        noisy, clean = [], noisy
    is_all_seen = run == size and not rows.causal_until and rows.document_BL is None
    parts: list[list[torch.Tensor]] = [[], []]
    for number, own in enumerate(clean):
        before = clean[:number]
        of_noisy = [([noisy[number]], [*before, noisy[number]])] if noisy else []
        groups = [*of_noisy, ([own], [*before, own])]
        if noisy and run > size:  # blocks of a run see each other's clean tokens, so that both halves share their keys
            groups = [([noisy[number], own], [*before, own, noisy[number]])]
        for group, (asking, seen) in enumerate(groups):
            (queries_at, queries, *_), (keys_at, _, keys, values) = (
                [torch.cat(columns) for columns in zip(*runs, strict=True)] for runs in (asking, seen)
            )
            mask = None if is_all_seen else rows.mask(queries_at, keys_at, (number, group))
            for half, part in enumerate(attend(queries, keys, values, mask).split(len(own[0]))):
                parts[half + group].append(part)
    return torch.cat([part for half in parts for part in half])

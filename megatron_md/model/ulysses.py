"""Attention under context parallelism, after DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509).

Each of the CP ranks of a group holds the same heads of a slice of every row's L positions, in order. Around attention
they trade: a rank gives its slice of all heads for whole rows of every CP-th part of the heads, and takes it back
afterwards. Whatever attention does with whole rows (rotary positions, documents, hidden pairs, causality) is the same.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all


def whole_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """This rank's share of the heads, over whole rows.

    Args:
        query: [L / CP, B, heads, d], of this rank's slice; CP divides `heads`.
        key: [L / CP, B, kv_heads, d]; heads are repeated as far as CP ranks need it to share them.
        value: as the key.
        group: the CP ranks that hold the slices, in the order of the slices.

    Returns:
        Query [L, B, heads / CP, d], key and value [L, B, lcm(kv_heads, CP) / CP, d].
    """
    size, kv_heads = group.size(), key.shape[2]
    repeats = math.lcm(kv_heads, size) // kv_heads
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
    # The ranks' shares of the heads come first, so that one exchange serves all three.
    shares = [x.unflatten(2, (size, -1)).movedim(2, 0) for x in (query, key, value)]
    mine = all_to_all(group, torch.cat(shares, dim=3)).flatten(0, 1)
    return mine.split([x.shape[3] for x in shares], dim=2)


def own_slice(context: torch.Tensor, width: int, group: dist.ProcessGroup) -> torch.Tensor:
    """What attention gave for this rank's share of the heads, as the rank's slice of the rows.

    Args:
        context: [L, B, heads / CP * d].
        width: d, of one head.
        group: as for `whole_rows`.

    Returns:
        [L / CP, B, heads * d].
    """
    slices = context.unflatten(0, (group.size(), -1)).unflatten(3, (-1, width))
    return all_to_all(group, slices).movedim(0, 2).flatten(2)

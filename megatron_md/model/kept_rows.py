"""Keys and values that attention keeps between the steps of a sampler, so that a step feeds a slice of rows only."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams

Kept = dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class KeptRows(PackedSeqParams):
    """A slice of rows of L tokens, as megatron-core's models hand it on to the core attention.

    Attributes:
        start: the slice's first place in the rows.
        length: L.
        kept: keys (rotated) and values of each attention module, from place 0 on: [kept, B, kv_heads, d].
        keep: how many of the slice's own are kept from now on, behind the kept ones before it.
        sees_after: queries see what is kept behind the slice as well.
        mask: which queries of the slice see which keys, bool [1, 1, slice, keys]; None: all.
    """

    start: int = 0
    length: int = 0
    kept: Kept = field(default_factory=dict, repr=False)
    keep: int = 0
    sees_after: bool = False
    mask: torch.Tensor | None = None

    def around(self, module: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the slice's queries of an attention module see, from its own of the slice."""
        fresh, stop = (key, value), self.start + len(key)
        before, after = [], []
        if module in self.kept:
            before = [x[: self.start] for x in self.kept[module]]
            after = [x[stop:] for x in self.kept[module]] if self.sees_after else []
        parts = [part for part in (before, fresh, after) if part]
        seen_key, seen_value = (torch.cat(both) if len(both) > 1 else both[0] for both in zip(*parts, strict=True))
        if self.keep:
            own = [x[: self.keep] for x in fresh]
            kept_key, kept_value = (torch.cat(both) for both in zip(*([before] if before else []), own, strict=True))
            self.kept[module] = (kept_key, kept_value)
        return seen_key, seen_value

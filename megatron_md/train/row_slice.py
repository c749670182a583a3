"""Context parallelism: each rank of a group computes the same slice of every row; attention alone sees whole rows.

The slices are runs of positions in order. Attention that sees a whole row costs the same everywhere, so that there is
nothing to balance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_md.batch import Int64Array
from megatron_md.model.head import PredictionLoss


@dataclass(frozen=True)
class RowSlice:
    """The `rank`-th of `size` equal slices of rows [B, L]; `group` holds all of them, in order."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def here(cls) -> RowSlice:
        """What this process computes."""
        group = parallel_state.get_context_parallel_group()
        return cls(group.rank(), group.size(), group)

    @property
    def is_first(self) -> bool:
        """Of the ranks that share rows, the one that counts what must be counted once."""
        return self.rank == 0

    def of(self, rows_BL: torch.Tensor) -> torch.Tensor:
        """The slice [B, L / size]."""
        return rows_BL.chunk(self.size, dim=1)[self.rank]

    def find(self, positions_M: Int64Array, length: int) -> tuple[Int64Array | slice, Int64Array]:
        """Which of the flat positions `b * L + l` lie in the slice, and where in it: `b * L / size + l`."""
        if self.size == 1:
            return slice(None), positions_M
        own = length // self.size
        row_M, column_M = np.divmod(positions_M, length)
        here = np.flatnonzero(column_M // own == self.rank)
        return here, row_M[here] * own + column_M[here] % own

    def whole_losses(
        self, losses: Sequence[PredictionLoss], positions: Sequence[Int64Array], length: int
    ) -> list[PredictionLoss]:
        """The losses of whole micro-batches on every rank of the group, from those that each found in its slice.

        Args:
            losses: of each micro-batch.
            positions: all of each one's flat positions, the group's together.
            length: L.
        """
        if self.size == 1 or not losses:
            return list(losses)
        parts = []
        for loss, positions_M in zip(losses, positions, strict=True):
            here, _ = self.find(positions_M, length)
            nll_M = loss.nll_M.new_zeros(len(positions_M))
            nll_M[here] = loss.nll_M
            parts += [loss.loss[None], nll_M]
        sums = torch.cat(parts)
        dist.all_reduce(sums, group=self.group)
        totals = sums.split([len(part) for part in parts])
        return [PredictionLoss(loss[0], nll_M) for loss, nll_M in zip(totals[::2], totals[1::2], strict=True)]

    def whole_logits(self, own_XV: torch.Tensor, here: Int64Array | slice, positions: int) -> torch.Tensor:
        """[positions, V] on every rank of the group, from those that each found `here` in its slice."""
        if self.size == 1:
            return own_XV
        whole_MV = own_XV.new_zeros((positions, own_XV.shape[1]))
        whole_MV[here] = own_XV
        dist.all_reduce(whole_MV, group=self.group)
        return whole_MV

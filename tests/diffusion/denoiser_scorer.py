"""Any callable as a `Scorer` in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_md.batch import CorruptedBatch, Int64Array
from megatron_md.diffusion.proposal import guide


class DenoiserScorer:
    """Any callable in this process: token ids [B, L] -> logits [B, L, V]."""

    data_rank = 0
    data_size = 1
    within_document = False
    right_shift = False
    block_size = None

    def __init__(
        self,
        denoiser: Callable[[torch.Tensor], torch.Tensor],
        *,
        micro_batch_size: int = 8,
        device: torch.device | str = "cpu",
        excluded: tuple[int, ...] = (),
        causal: bool = False,
    ) -> None:
        """Wrap a callable.

        Args:
            denoiser: gives logits of any float type; -inf for tokens that it never predicts.
            micro_batch_size: rows per call.
            device: where it wants its tokens.
            excluded: tokens to leave out of the softmax (the mask token, if the model was trained without it).
            causal: it attends to the left only.
        """
        self.denoiser, self.micro_batch_size, self.device = denoiser, micro_batch_size, torch.device(device)
        self.excluded, self.causal = list(excluded), causal

    @torch.no_grad()
    def negative_log_likelihoods(self, batches: Sequence[CorruptedBatch]) -> list[npt.NDArray[Any]]:
        """Cross-entropy at each batch's positions, in fp32 at least."""
        return [self._score(batch) for batch in batches]

    @torch.no_grad()
    def guided_negative_log_likelihoods(
        self, batches: Sequence[CorruptedBatch], without_prompt: Sequence[Int64Array], guidance: float
    ) -> list[npt.NDArray[Any]]:
        """The same of guided logits."""
        return [self._score(*pair, guidance) for pair in zip(batches, without_prompt, strict=True)]

    def _logits(self, tokens_BL: Int64Array, positions_M: Int64Array) -> torch.Tensor:
        logits_BLV = self.denoiser(torch.from_numpy(tokens_BL).to(self.device))
        logits_MV = logits_BLV.flatten(0, 1)[torch.from_numpy(positions_M).to(self.device)]
        logits_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
        logits_MV[:, self.excluded] = -torch.inf
        return logits_MV

    def _score(
        self, batch: CorruptedBatch, unprompted_BL: Int64Array | None = None, guidance: float = 0.0
    ) -> npt.NDArray[Any]:
        if not len(batch.positions_M):
            return np.zeros(0)
        logits_MV = self._logits(batch.tokens_BL, batch.positions_M)
        if unprompted_BL is not None:
            logits_MV = guide(logits_MV, self._logits(unprompted_BL, batch.positions_M), guidance)
        targets_M = torch.from_numpy(batch.targets_M).to(self.device)
        nll_M: npt.NDArray[Any] = (
            torch.nn.functional.cross_entropy(logits_MV, targets_M, reduction="none").cpu().numpy()
        )
        return nll_M

    def sum_over_ranks(self, figures: torch.Tensor) -> torch.Tensor:
        """One rank: the figures themselves."""
        return figures

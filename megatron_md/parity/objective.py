"""Direct supervision of the label, as an objective beside masked diffusion, and the report of any loss by regime."""

from __future__ import annotations

import numpy as np
import torch

from megatron_md.batch import BoolArray, CleanBatch, CorruptedBatch
from megatron_md.diffusion.corruption import (
    FloatArray,
    assemble,
    mask_at_rate,
    stratified_uniforms_of_rows,
)
from megatron_md.diffusion.objective import (
    MEAN_METRICS,
    Metrics,
    Objective,
    ObjectiveContext,
    mean_metrics,
    register_objective,
)
from megatron_md.diffusion.theory import in_signal_regime
from megatron_md.parity.config import DIRECT


@register_objective(DIRECT)
class DirectSupervision:
    """Predict the last token of each row, the label, from the others: `loss = mean over rows of CE(label)`.

    Under `mask_inputs` every other position is masked with probability t of the mask schedule, as in masked diffusion:
    the same corruption of the inputs, but the label is the only thing that is predicted.
    """

    name: str = DIRECT
    causal: bool = False
    metric_names: tuple[str, ...] = MEAN_METRICS

    def __init__(self, context: ObjectiveContext, *, mask_inputs: bool = False) -> None:
        """Build from the config; `weight`, `normalise` and `importance` do not matter."""
        self.schedule = context.schedule
        self.seed = context.seed
        self.mask_token_id = context.mask_token_id
        self.mask_inputs = mask_inputs

    def corrupt(self, batch: CleanBatch) -> CorruptedBatch:
        """Mask the label, and under `mask_inputs` others; see `Objective.corrupt`."""
        if not self.mask_inputs:
            return supervise_label(batch, np.zeros_like(batch.is_maskable_BL), self.mask_token_id)
        rate_B = self.schedule.sample(stratified_uniforms_of_rows(self.seed, batch), batch.position.progress)
        is_masked_BL = mask_at_rate(self.seed, batch.sample_index_B, rate_B, batch.is_maskable_BL)
        return supervise_label(batch, is_masked_BL, self.mask_token_id, rate_B)

    def reduce(self, nll_M: torch.Tensor, corrupted: CorruptedBatch) -> Metrics:
        """`masked_ce` (that of the label) and `mean_mask_rate`; see `Objective.reduce`."""
        return mean_metrics(nll_M, corrupted)


def supervise_label(
    batch: CleanBatch, is_masked_BL: BoolArray, mask_token_id: int, mask_rate_B: FloatArray | None = None
) -> CorruptedBatch:
    """The batch with `is_masked_BL` and every label masked, where only labels are scored, each at weight 1.

    Args:
        batch: clean rows; one with a label that is not maskable is not scored.
        is_masked_BL: further positions to mask.
        mask_token_id: the mask token.
        mask_rate_B: the rates they were drawn with; 1 / L of each row if None.
    """
    is_label_BL = np.zeros_like(batch.is_maskable_BL)
    is_label_BL[:, -1] = batch.is_maskable_BL[:, -1]
    rows, length = is_label_BL.shape
    return assemble(
        batch,
        tokens_BL=np.where(is_masked_BL | is_label_BL, mask_token_id, batch.tokens_BL),
        is_scored_BL=is_label_BL,
        weights_B=np.ones(rows),
        denominator=int(is_label_BL.sum()),
        mask_rate_B=np.full(rows, 1.0 / length) if mask_rate_B is None else mask_rate_B,
    )


class ReportByRegime:
    """An objective that also reports its loss by regime: `signal_loss + noise_loss = loss`, exactly.

    `signal_share` is the share of rows in the signal regime, whose expectation under masked diffusion is the
    schedule's P_S.
    """

    def __init__(self, objective: Objective, signal_positions: tuple[int, ...], mask_token_id: int) -> None:
        """Wrap `objective` for a task with these positions S'."""
        self.name, self.causal = objective.name, objective.causal
        self.metric_names = (*objective.metric_names, "signal_loss", "noise_loss", "signal_share")
        self.corrupt = objective.corrupt
        self._objective, self._positions, self._mask_token_id = objective, signal_positions, mask_token_id

    def reduce(self, nll_M: torch.Tensor, corrupted: CorruptedBatch) -> Metrics:
        """The objective's own metrics and the split; see `Objective.reduce`."""
        length = corrupted.tokens_BL.shape[1]
        in_parity_L = np.isin(np.arange(length), self._positions)
        is_signal_B = in_signal_regime(corrupted.tokens_BL == self._mask_token_id, in_parity_L)
        is_signal_M = is_signal_B[corrupted.positions_M // length]
        weights = np.stack([corrupted.weights_M * is_signal_M, corrupted.weights_M * ~is_signal_M])
        signal, noise = (torch.from_numpy(weights).to(nll_M) @ nll_M).double()
        count = float(corrupted.denominator)
        return {
            **self._objective.reduce(nll_M, corrupted),
            "signal_loss": (signal, count),
            "noise_loss": (noise, count),
            "signal_share": (float(is_signal_B.sum()), float(len(is_signal_B))),
        }

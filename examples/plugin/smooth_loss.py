"""A callback of one's own: `imports: [smooth_loss]` adds a smoothed loss to every record of `metrics.jsonl`."""

from __future__ import annotations

from megatron_md.config import ResolvedConfig
from megatron_md.train.callback import Callback, StepResult, register_callback
from megatron_md.train.trainer import Trainer


@register_callback
class SmoothLoss(Callback):
    """`loss_smooth`: an exponential average of the loss over all steps of this process that were not skipped."""

    def __init__(self, config: ResolvedConfig) -> None:
        """`config` is the run's; this callback has no use for it."""
        self.average: float | None = None

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Called on every rank after every step; what is added to the record is logged with it."""
        loss = result.record["loss"]
        if result.fault is None:
            self.average = loss if self.average is None else 0.9 * self.average + 0.1 * loss
        result.record["loss_smooth"] = self.average

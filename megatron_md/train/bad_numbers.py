"""Losses and gradients that must not reach the weights: which update is left out, and when that has gone too far.

All decisions are functions of one step's loss and gradient norm and of `GuardState`, which checkpoints carry; so all
ranks decide alike, and a resumed run decides as the uninterrupted one did. No torch is needed here.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import ConfigDict, Field

from megatron_md.errors import RunFailedError

WINDOW = 128  # accepted losses that the running median is taken over
FEWEST = 32  # accepted losses before a spike can be told from the start of a run

# What a record that comes from a file may hold.
RECORD = ConfigDict(extra="forbid")
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Loss = Annotated[float, Field(allow_inf_nan=False)]


class BadNumbersError(RunFailedError):
    """Loss, gradients or weights are bad, and the run knows no way on."""


def not_finite(loss: float, grad_norm: float) -> str | None:
    """Which of the two is not a finite number, in words; None if both are."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            return f"the {name} is not finite"
    return None


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers.

    Attributes:
        recent_losses: the last `WINDOW` accepted losses in nats, oldest first.
        skipped_total: updates left out in the whole run.
        skipped_in_row: updates left out since the last accepted one.
        first_skipped_step: steps done before the first of those.
        first_skipped_row: `sample_index` g of the first row of those.
        rollbacks: returns to a checkpoint in the whole run.
        is_proven: an update has been accepted since the newest of those; else its checkpoint may be what is bad.
        suspects: rows [first, stop) that the newest return blamed, or took up again when it blamed the checkpoint.
    """

    __pydantic_config__ = RECORD

    recent_losses: tuple[Loss, ...] = ()
    skipped_total: Whole = 0
    skipped_in_row: Whole = 0
    first_skipped_step: Whole = 0
    first_skipped_row: Whole = 0
    rollbacks: Whole = 0
    is_proven: bool = True
    suspects: tuple[Whole, Whole] = (0, 0)

    def fault(self, loss: float, grad_norm: float, spike_factor: float | None) -> str | None:
        """Why an update with this loss (nats) and gradient norm must be left out; None if it need not."""
        fault = not_finite(loss, grad_norm)
        if fault is None and spike_factor and len(self.recent_losses) >= FEWEST:
            median = statistics.median(self.recent_losses)
            if loss > spike_factor * median:
                return f"the loss {loss:.4g} is above {spike_factor:g} x the running median {median:.4g}"
        return fault

    def after(self, loss: float, *, skipped: bool, step: int, first_row: int) -> GuardState:
        """The state once the step from `step` to `step + 1`, whose rows begin at g = `first_row`, is done."""
        if not skipped:
            losses = (*self.recent_losses, loss)[-WINDOW:]
            return replace(self, recent_losses=losses, skipped_in_row=0, is_proven=True)
        state = replace(self, skipped_total=self.skipped_total + 1, skipped_in_row=self.skipped_in_row + 1)
        if self.skipped_in_row:
            return state
        return replace(state, first_skipped_step=step, first_skipped_row=first_row)

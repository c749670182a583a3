"""What may happen around a step: the protocol that logging, validation, saving and users' own code share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_md.train.trainer import Trainer

Record = dict[str, Any]


class Callback:
    """Base of all callbacks; every method is called on every rank and does nothing by default.

    A record holds one step's metrics under the names of `metrics.jsonl`; a callback may add to it, and later callbacks
    see what earlier ones added.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process, after a checkpoint has been loaded."""

    def on_rollback(self, trainer: Trainer) -> None:
        """After the return to a checkpoint within a run; by default what is done at a start."""
        self.on_start(trainer)

    def after_step(self, trainer: Trainer, record: Record) -> None:
        """After an optimizer step; `trainer.progress` already counts it."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, or when the run was asked to stop."""

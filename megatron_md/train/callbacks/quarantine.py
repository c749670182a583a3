"""Damage in the training data: all ranks agree on what is left out, and stop together when it is too much."""

from __future__ import annotations

from pathlib import Path

from megatron_md.data.ledger import LEDGER_NAME, QuarantineLedger
from megatron_md.errors import UserError
from megatron_md.together import together
from megatron_md.train.callback import Callback, StepResult
from megatron_md.train.trainer import Trainer

NAMED = 3


class QuarantineError(UserError):
    """More documents are damaged than the config tolerates."""


class Quarantine(Callback):
    """Keeps the run's ledger, equal on all ranks, and the figure `quarantined`: damaged documents met so far."""

    def __init__(self, run_dir: Path, *, max_quarantined: int) -> None:
        self.path = run_dir / LEDGER_NAME
        self.max_quarantined = max_quarantined
        self.ledger = QuarantineLedger()

    def on_start(self, trainer: Trainer) -> None:
        """Cut the file back to where the run stands."""
        if trainer.world.is_main and (len(self.ledger) or self.path.exists()):
            self.ledger.write(self.path)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Add what any rank has met in this step.

        Raises:
            QuarantineError: on all ranks at once, when the ledger holds more than `data.max_quarantined` documents.
        """
        if result.is_damaged:
            # Rare, so that it may be slow: every rank learns every other's documents.
            met = set().union(*together(lambda: result.damaged))
            new = {document for document in met if document not in self.ledger}
            self.ledger.add(new, trainer.progress.step)
            if new and trainer.world.is_main:
                self.ledger.write(self.path)
        result.record["quarantined"] = len(self.ledger)
        if len(self.ledger) > self.max_quarantined:
            newest = [f"{entry.shard} document {entry.document}" for entry in list(self.ledger)[-NAMED:]]
            raise QuarantineError(
                f"{len(self.ledger)} damaged documents, more than data.max_quarantined {self.max_quarantined} (last: "
                f"{', '.join(newest)}); {self.path} lists them: restore the shards, or raise data.max_quarantined"
            )

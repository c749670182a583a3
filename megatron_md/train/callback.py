"""What may happen around a step: the protocol that logging, validation, saving and users' own code share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_md.batch import DamagedDocument
from megatron_md.config import ResolvedConfig

if TYPE_CHECKING:
    from megatron_md.train.trainer import Trainer

Record = dict[str, Any]


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        record: its metrics under the names of `metrics.jsonl`; a callback may add to it, and later callbacks see what
            earlier ones added.
        fault: why its update was left out, else None.
        rows: [first, stop) of its global batch, in g.
        damaged: documents that left gaps in this rank's rows.
        is_damaged: any rank has met such a document.
        stop_votes: how many ranks have been asked to stop, by what has asked them.
        votes: by `id` of a callback: the sum over all ranks of what its `vote` gave before the step.
    """

    record: Record
    fault: str | None
    rows: tuple[int, int]
    damaged: frozenset[DamagedDocument]
    is_damaged: bool
    stop_votes: list[float]
    votes: dict[int, float]


class Callback:
    """Base of all callbacks; every method is called on every rank and does nothing by default."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process, after a checkpoint has been loaded."""

    def on_rollback(self, trainer: Trainer) -> None:
        """After the return to a checkpoint within a run; by default what is done at a start."""
        self.on_start(trainer)

    def vote(self, trainer: Trainer) -> float:
        """A number that all ranks are to know the sum of after the next step, at no cost."""
        return 0.0

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """After an optimizer step; `trainer.progress` already counts it."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, or when the run was asked to stop."""


CallbackFactory = Callable[[ResolvedConfig], Callback]
Factory = TypeVar("Factory", bound=CallbackFactory)
_registered: list[CallbackFactory] = []


def register_callback(factory: Factory) -> Factory:
    """Decorator for a subclass of `Callback`: every run whose `imports` name its module has one, made from its config.

    It comes after validation and before the metrics are written, so that what it adds to a step's record is logged.
    """
    _registered.append(factory)
    return factory


def imported_callbacks(config: ResolvedConfig) -> list[Callback]:
    """Those of the modules that a config imports, in the order of `imports`."""
    return [make(config) for name in config.imports for make in _registered if make.__module__ == name]

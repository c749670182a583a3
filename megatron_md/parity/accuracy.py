"""Label accuracy on training and held-out rows during a run, and the end of a run that has learnt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_md.batch import Int64Array
from megatron_md.diffusion.scoring import ScoredRows, Scorer
from megatron_md.parity.config import MASK_TOKEN_ID
from megatron_md.parity.objective import supervise_label
from megatron_md.train.callback import Callback, StepResult
from megatron_md.train.trainer import Trainer

MEMORISED_AT, CHANCE_BELOW = 0.99, 0.58  # train accuracy that counts as learnt; validation accuracy near chance


class LabelEvaluator:
    """Scores a fixed set of rows with all bits visible and only the label masked."""

    def __init__(self, tokens_RL: Int64Array, scorer: Scorer) -> None:
        """Score `tokens_RL` through `scorer`."""
        self.scorer = scorer
        rows = ScoredRows(tokens_RL, np.ones_like(tokens_RL, dtype=np.bool_))
        self._corrupted = [
            supervise_label(batch, np.zeros_like(batch.is_maskable_BL), MASK_TOKEN_ID)
            for batch, _ in rows.micro_batches(np.arange(len(tokens_RL)), scorer)
        ]

    def run(self) -> tuple[float, float]:
        """Accuracy and mean cross-entropy (nats) of the label, equal on all ranks; every rank calls this.

        Only two tokens can be predicted, so a label is right iff its cross-entropy is below log 2.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        losses = self.scorer.negative_log_likelihoods(self._corrupted)
        for nll_M in losses or []:
            sums += torch.tensor([(nll_M < math.log(2.0)).sum(), nll_M.sum(dtype=np.float64), len(nll_M)])
        right, nll, count = self.scorer.sum_over_ranks(sums).tolist()
        return right / count, nll / count


def weight_norm(chunks: list[torch.nn.Module]) -> float:
    """Euclidean norm of all weights, each counted once over tensor- and pipeline-parallel ranks."""
    is_parallel = parallel_state.is_initialized()
    squares = [
        parameter.detach().double().square().sum()
        for chunk in chunks
        for parameter in chunk.parameters()
        if not is_parallel or (param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter))
    ]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    if is_parallel:
        torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return math.sqrt(total.item())


@dataclass
class Learning:
    """What a run has shown so far.

    Attributes:
        reached_step: first measurement with validation accuracy at `stop_at` (at 99 % where that is null), or None.
        memorised_step: first measurement with train accuracy of at least 99 % and validation accuracy below 58 %.
        largest_gap: largest train minus validation accuracy.
        largest_gap_step: where it was.
        train_accuracy, valid_accuracy: the newest measurement.
    """

    reached_step: int | None = None
    memorised_step: int | None = None
    largest_gap: float = -math.inf
    largest_gap_step: int = 0
    train_accuracy: float = math.nan
    valid_accuracy: float = math.nan

    def add(self, step: int, train: float, valid: float, goal: float) -> None:
        """Take in a measurement."""
        self.train_accuracy, self.valid_accuracy = train, valid
        if train - valid > self.largest_gap:
            self.largest_gap, self.largest_gap_step = train - valid, step
        if self.reached_step is None and valid >= goal:
            self.reached_step = step
        if self.memorised_step is None and train >= MEMORISED_AT and valid < CHANCE_BELOW:
            self.memorised_step = step


@dataclass
class AccuracyReport(Callback):
    """Measures every `every` steps and after the last one, adds to the record, and ends the run at the goal.

    `signal_probability` gives P_S at a progress of the run in [0, 1].
    """

    train: LabelEvaluator
    valid: LabelEvaluator
    every: int
    last_step: int
    stop_at: float | None
    signal_probability: Callable[[float], float]
    learning: Learning = field(default_factory=Learning)
    is_at_goal: bool = False

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Measure where it is due."""
        step = trainer.progress.step
        # All batches have one size, so this is the progress that the step's mask rates were drawn at.
        result.record["signal_probability"] = self.signal_probability((step - 1) / self.last_step)
        if step % self.every and step != self.last_step:
            return
        result.record["train_accuracy"], result.record["train_label_ce"] = self.train.run()
        result.record["valid_accuracy"], result.record["valid_label_ce"] = self.valid.run()
        result.record["weight_norm"] = weight_norm(trainer.stepper.chunks)
        goal = MEMORISED_AT if self.stop_at is None else self.stop_at
        self.learning.add(step, result.record["train_accuracy"], result.record["valid_accuracy"], goal)
        if self.stop_at is not None and result.record["valid_accuracy"] >= self.stop_at:
            trainer.stopped_by = f"validation accuracy {result.record['valid_accuracy']:.3f}"
            self.is_at_goal = True

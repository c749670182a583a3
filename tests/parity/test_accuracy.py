"""Label accuracy: what counts as right, rows that fill up a batch, and what a run has shown."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch

from megatron_md.batch import CorruptedBatch
from megatron_md.parallel import World
from megatron_md.parity.accuracy import LabelEvaluator, Learning, weight_norm
from megatron_md.train.step import Stepper


class Oracle:
    """A stepper whose model knows the label of the rows whose first bit is 1, and takes the other one elsewhere."""

    def __init__(self, micro_batch_size: int, round_micro_batches: int) -> None:
        self.micro_batch_size, self.round_micro_batches = micro_batch_size, round_micro_batches

    def negative_log_likelihoods(self, batches: list[CorruptedBatch]) -> list[np.ndarray]:
        assert len(batches) % self.round_micro_batches == 0
        losses = []
        for batch in batches:
            assert np.all((batch.tokens_BL == 2).sum(axis=1) <= 1), "more than the label is masked"
            knows_M = batch.tokens_BL[batch.positions_M // batch.tokens_BL.shape[1], 0] == 1
            losses.append(np.where(knows_M, -math.log(0.9), -math.log(0.1)).astype(np.float32))
        return losses

    def sum_over_ranks(self, figures: torch.Tensor) -> torch.Tensor:
        return figures


@pytest.mark.parametrize(("size", "rounds"), [(1, 1), (4, 1), (4, 2), (7, 1), (64, 1)])
def test_accuracy_counts_every_row_once(size: int, rounds: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 2, (13, 6))
    world = World(0, 1, torch.device("cpu"), 0, 1, True)
    accuracy, nll = LabelEvaluator(tokens, cast(Stepper, Oracle(size, rounds)), world).run()
    known = int(tokens[:, 0].sum())
    assert 0 < known < 13
    assert accuracy == pytest.approx(known / 13)
    assert nll == pytest.approx(-(known * math.log(0.9) + (13 - known) * math.log(0.1)) / 13)


def test_two_ranks_share_the_rows() -> None:
    tokens = np.random.default_rng(0).integers(0, 2, (13, 6))
    sums: list[Any] = []

    class Recorder(Oracle):
        def sum_over_ranks(self, figures: torch.Tensor) -> torch.Tensor:
            sums.append(figures)
            return figures

    for rank in range(2):
        world = World(rank, 2, torch.device("cpu"), rank, 2, True)
        LabelEvaluator(tokens, cast(Stepper, Recorder(4, 1)), world).run()
    assert (sums[0] + sums[1]).tolist()[0] == tokens[:, 0].sum() and (sums[0] + sums[1]).tolist()[2] == 13


def test_what_a_run_has_shown() -> None:
    learning = Learning()
    for step, train, valid in [(10, 0.6, 0.5), (20, 0.995, 0.55), (30, 1.0, 0.6), (40, 1.0, 0.992), (50, 1.0, 0.98)]:
        learning.add(step, train, valid, 0.99)
    assert learning.reached_step == 40 and learning.memorised_step == 20
    assert (learning.largest_gap, learning.largest_gap_step) == (pytest.approx(0.445), 20)
    assert (learning.train_accuracy, learning.valid_accuracy) == (1.0, 0.98)


def test_weight_norm_of_one_process() -> None:
    model = torch.nn.Linear(3, 2)
    expected = math.sqrt(sum(float((p.detach().double() ** 2).sum()) for p in model.parameters()))
    assert weight_norm([model]) == pytest.approx(expected)

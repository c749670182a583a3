"""Label accuracy: what counts as right, rows that fill up a batch, and what a run has shown."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.batch import CorruptedBatch
from megatron_md.parity.accuracy import LabelEvaluator, Learning, weight_norm


class Oracle:
    """A scorer whose model knows the label of the rows whose first bit is 1, and takes the other one elsewhere."""

    causal = right_shift = within_document = False
    block_size: int | None = None

    def __init__(self, micro_batch_size: int, data_rank: int = 0, data_size: int = 1) -> None:
        self.micro_batch_size, self.data_rank, self.data_size = micro_batch_size, data_rank, data_size

    def negative_log_likelihoods(self, batches: list[CorruptedBatch]) -> list[np.ndarray]:
        losses = []
        for batch in batches:
            assert np.all((batch.tokens_BL == 2).sum(axis=1) <= 1), "more than the label is masked"
            knows_M = batch.tokens_BL[batch.positions_M // batch.tokens_BL.shape[1], 0] == 1
            losses.append(np.where(knows_M, -math.log(0.9), -math.log(0.1)).astype(np.float32))
        return losses

    def sum_over_ranks(self, figures: torch.Tensor) -> torch.Tensor:
        return figures


@pytest.mark.parametrize("size", [1, 4, 7, 64])
def test_accuracy_counts_every_row_once(size: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 2, (13, 6))
    accuracy, nll = LabelEvaluator(tokens, Oracle(size)).run()
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
        LabelEvaluator(tokens, Recorder(4, rank, 2)).run()
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

"""Direct supervision of the label, and the split of any loss by regime."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.batch import BatchPosition, CleanBatch
from megatron_md.diffusion.objective import Objective, build_objective
from megatron_md.diffusion.schedule import parse_schedule
from megatron_md.diffusion.theory import schedule_signal_probability
from megatron_md.parity.config import MASK_TOKEN_ID
from megatron_md.parity.objective import ReportByRegime
from megatron_md.parity.task import ParityStream, ParityTask
from tests.parity.parity_config import small

DIRECT: dict[str, Any] = {"name": "direct_supervision"}


def built(options: dict[str, Any]) -> Objective:
    return build_objective(small(objective=options).objective, seed=5, mask_token_id=MASK_TOKEN_ID)


def clean(rows: int, task: ParityTask) -> CleanBatch:
    served = ParityStream(task, seed=5).rows(range(rows))
    return CleanBatch(served.tokens_BL, served.is_maskable_BL, served.sample_index_B, BatchPosition(0, rows))


@pytest.fixture
def task() -> ParityTask:
    return ParityTask.of(small(task={"n": 10, "k": 3, "train_samples": 200, "valid_samples": 100}))


def test_direct_supervision_hides_and_scores_the_label_alone(task: ParityTask) -> None:
    batch = clean(64, task)
    corrupted = built(DIRECT).corrupt(batch)
    np.testing.assert_array_equal(corrupted.tokens_BL[:, :-1], batch.tokens_BL[:, :-1])
    assert np.all(corrupted.tokens_BL[:, -1] == MASK_TOKEN_ID)
    np.testing.assert_array_equal(corrupted.positions_M, np.arange(64) * 11 + 10)
    np.testing.assert_array_equal(corrupted.targets_M, batch.tokens_BL[:, -1])
    assert np.all(corrupted.weights_M == 1.0) and corrupted.denominator == 64


def test_masked_inputs_are_those_of_masked_diffusion(task: ParityTask) -> None:
    batch = clean(256, task)
    masked = built({**DIRECT, "options": {"mask_inputs": True}}).corrupt(batch)
    diffusion = built({}).corrupt(batch)
    np.testing.assert_array_equal(masked.tokens_BL[:, :-1], diffusion.tokens_BL[:, :-1])
    assert np.all(masked.tokens_BL[:, -1] == MASK_TOKEN_ID) and masked.denominator == 256
    np.testing.assert_array_equal(masked.targets_M, batch.tokens_BL[:, -1])


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="unexpected keyword argument 'mask_input'"):
        built({**DIRECT, "options": {"mask_input": True}})


@pytest.mark.parametrize(
    "options", [{}, {"weight": "elbo"}, {"normalise": "maskable", "mask_schedule": "beta:2,3"}, DIRECT]
)
def test_the_split_by_regime_sums_to_the_loss(options: dict[str, Any], task: ParityTask) -> None:
    corrupted = built(options).corrupt(clean(128, task))
    nll_M = torch.rand(len(corrupted.targets_M), generator=torch.Generator().manual_seed(0))
    report = ReportByRegime(built(options), task.signal_positions, MASK_TOKEN_ID).reduce(nll_M, corrupted)
    loss = float(nll_M.double() @ torch.from_numpy(corrupted.weights_M).double()) / corrupted.denominator
    parts = [float(report[name][0]) / report[name][1] for name in ("signal_loss", "noise_loss")]
    assert sum(parts) == pytest.approx(loss, rel=1e-6)
    # Counted by hand: exactly one of the secret positions and the label masked.
    masked_BL = corrupted.tokens_BL == MASK_TOKEN_ID
    is_signal_B = np.array([row[list(task.signal_positions)].sum() == 1 for row in masked_BL])
    row_M = corrupted.positions_M // 11
    by_hand = sum(
        float(nll) * float(weight)
        for nll, weight, row in zip(nll_M, corrupted.weights_M, row_M, strict=True)
        if is_signal_B[row]
    )
    assert parts[0] == pytest.approx(by_hand / corrupted.denominator, rel=1e-5)
    assert report["signal_share"] == (is_signal_B.sum(), 128)


@pytest.mark.parametrize("schedule", ["uniform:0,0.4156", "uniform:0,1", "point:0.25", "beta:2,5"])
def test_the_share_of_signal_masks_is_the_theorys(schedule: str, task: ParityTask) -> None:
    rows = 20_000
    objective = ReportByRegime(built({"mask_schedule": schedule}), task.signal_positions, MASK_TOKEN_ID)
    corrupted = objective.corrupt(clean(rows, task))
    share, count = objective.reduce(torch.zeros(len(corrupted.targets_M)), corrupted)["signal_share"]
    expected = schedule_signal_probability(parse_schedule(schedule), 3)
    assert abs(float(share) / count - expected) < 4.0 * math.sqrt(expected * (1.0 - expected) / rows)

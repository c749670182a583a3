"""Noise on masked embeddings: the same on every layout, in training alone, and gone when it should be."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from megatron_md.config import Config
from megatron_md.config.objective import MaskNoiseConfig
from megatron_md.train.mask_noise import row_noise
from tests.ranks import run_ranks
from tests.small_run import small_run, variant
from tests.train.test_step import LAYOUTS, STEPS, assert_same, reference, slow, train

NOISE = MaskNoiseConfig(std=0.5, until=0.5)
NOISY = variant(objective={"mask_noise": NOISE}, train={"steps": 2 * (STEPS - 1)})


@cache
def alone() -> dict[str, Any]:
    return run_ranks(train, 1, NOISY, STEPS)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tensor2+sequence", "pipeline2-interleaved",
                                    *slow("context2xtensor2+sequence", "data2", "context2", "tensor2")])  # fmt: skip
def test_layout_reproduces_one_process(layout: str) -> None:
    size, keys = LAYOUTS[layout]
    assert_same(run_ranks(train, size, variant(NOISY, parallel=keys), STEPS), alone())
    # The tolerance would show noise of other rows or places: without any the first gradient norm is another one.
    assert abs(alone()["curve"][0][1] / reference("masked_diffusion")["curve"][0][1] - 1) > 1e-2


@pytest.mark.distributed
def test_block_rows_have_it_in_their_masked_half() -> None:
    config = variant(NOISY, objective={"name": "block_diffusion", "block_size": 8})
    (noisy,) = run_ranks(train, 1, config, 2)
    (plain,) = run_ranks(train, 1, variant(config, objective={"mask_noise": None}), 2)
    assert abs(noisy["curve"][0][1] / plain["curve"][0][1] - 1) > 1e-2


def test_it_falls_to_nothing() -> None:
    rows = np.array([4, 9])
    stds = [row_noise(NOISY, progress, rows) for progress in (0.0, 0.25, 0.5, 0.9)]
    assert [None if noise is None else noise.std for noise in stds] == [0.5, 0.25, None, None]
    assert stds[0] is not None and stds[1] is not None and stds[0].seeds == stds[1].seeds
    other = row_noise(NOISY, 0.0, np.array([9, 5]))
    assert other is not None and other.seeds[0] == stds[0].seeds[1] and len({*stds[0].seeds, *other.seeds}) == 3
    assert row_noise(variant(), 0.0, rows) is None


def looked_at(config: Config) -> tuple[list[float], list[float]]:
    """Losses of a micro-batch without gradients, before and after a training pass with noise that updates nothing."""
    with small_run(config) as run:
        batches = run.stepper.corrupt(run.batches(0))

        def losses() -> list[float]:
            return np.concatenate(run.inference.negative_log_likelihoods(batches)).tolist()

        before = losses()
        run.stepper.train(batches, judge=lambda loss, norm: "left out")
        return before, losses()


@pytest.mark.distributed
def test_validation_has_none() -> None:
    ((before, after),) = run_ranks(looked_at, 1, NOISY)
    assert before == after
    assert before == run_ranks(looked_at, 1, variant(NOISY, objective={"mask_noise": None}))[0][0]


@pytest.mark.distributed
def test_the_autoregressive_objective_has_nothing_to_add_it_to() -> None:
    config = variant(NOISY, objective={"name": "autoregressive"})
    assert any(line.startswith("objective.mask_noise: autoregressive masks nothing") for line in config.problems())

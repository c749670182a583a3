"""Rows, masks and weights of block diffusion: identities, and a pure function of (seed, row, block)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.batch import BatchPosition, CleanBatch, CorruptedBatch
from megatron_md.config.objective import BlockStage
from megatron_md.diffusion.blocks import exact_block_masks, next_tokens, size_at
from megatron_md.diffusion.estimators import Estimator
from tests.diffusion.test_objective import MASK, VOCAB, build, loss_of_uniform_model, rows, split

LENGTH = 40


def block(size: int, **keys: Any) -> Any:
    return build(name="block_diffusion", block_size=size, **keys)


def assert_same_batch(ours: CorruptedBatch, theirs: CorruptedBatch) -> None:
    for name in ("tokens_BL", "positions_M", "targets_M", "weights_M", "mask_rate_B"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert (ours.denominator, ours.block_size) == (theirs.denominator, theirs.block_size)


@pytest.mark.parametrize("keys", [{}, {"weight": "realised"}, {"weight": "none", "normalise": "masked"}], ids=str)
@pytest.mark.parametrize("schedule", ["uniform:0,1", "uniform:0.45,0.55", "bell"])
def test_a_block_of_the_row_s_length_is_masked_diffusion_to_the_bit(schedule: str, keys: dict[str, Any]) -> None:
    batch = rows(24, 8)
    assert_same_batch(
        block(LENGTH, mask_schedule=schedule, **keys).corrupt(batch),
        build(mask_schedule=schedule, **keys).corrupt(batch),
    )


def test_sequences_of_one_block_count_as_in_fine_tuning() -> None:
    batch = rows(24, 8)
    ours = block(LENGTH, normalise="sequences").corrupt(batch)
    theirs = build(name="masked_diffusion_sft").corrupt(batch)
    np.testing.assert_allclose(ours.weights_M, theirs.weights_M, rtol=1e-6)
    assert ours.denominator == theirs.denominator == 8


def test_a_block_of_one_token_at_rate_one_is_the_autoregressive_loss_of_the_same_tokens() -> None:
    batch = rows(0, 8)
    ours, theirs = block(1, mask_schedule="point:1").corrupt(batch), build(name="autoregressive").corrupt(batch)
    row_M, column_M = np.divmod(ours.positions_M, 2 * LENGTH)
    np.testing.assert_array_equal(row_M * LENGTH + column_M, theirs.positions_M)
    np.testing.assert_array_equal(ours.targets_M, theirs.targets_M)
    np.testing.assert_array_equal(ours.weights_M, theirs.weights_M)
    assert ours.denominator == theirs.denominator


def test_rows_are_masked_in_the_first_half_and_clean_in_the_second() -> None:
    batch = rows(0, 6)
    corrupted = block(8).corrupt(batch)
    masked, clean = np.split(corrupted.tokens_BL, 2, axis=1)
    np.testing.assert_array_equal(clean, batch.tokens_BL)
    is_masked = masked == MASK
    np.testing.assert_array_equal(masked[~is_masked], batch.tokens_BL[~is_masked])
    assert is_masked.any() and not (is_masked & ~batch.is_maskable_BL).any()
    row_M, column_M = np.divmod(corrupted.positions_M, 2 * LENGTH)
    np.testing.assert_array_equal(row_M * LENGTH + column_M, np.flatnonzero(is_masked))
    np.testing.assert_array_equal(corrupted.targets_M, batch.tokens_BL[is_masked])


def test_each_block_has_a_rate_of_its_own_stratified_over_all_of_the_global_batch() -> None:
    count, size = 16, 8
    whole = CleanBatch(np.zeros((count, LENGTH), dtype=np.int64), np.ones((count, LENGTH), dtype=bool),
                       np.arange(count), BatchPosition(0, count))  # fmt: skip
    corrupted = block(size, weight="elbo").corrupt(whole)
    rate_M = 1.0 / corrupted.weights_M
    row_M, column_M = np.divmod(corrupted.positions_M, 2 * LENGTH)
    number_M = row_M * 5 + column_M // size
    found = {int(number): set(rate_M[number_M == number].round(5)) for number in np.unique(number_M)}
    assert all(len(rates) == 1 for rates in found.values())
    strata = np.array([math.floor(next(iter(rates)) * 80) for rates in found.values()])
    assert len(set(strata.tolist())) == len(strata) > 70, "a stratum of 1/80 for each of the 80 blocks"


@pytest.mark.parametrize("keys", [{}, {"autoregressive_weight": 3.0}, {"normalise": "sequences"}], ids=str)
def test_masks_do_not_depend_on_the_layout(keys: dict[str, Any]) -> None:
    objective, batch = block(8, **keys), rows(64, 8)
    whole = objective.corrupt(batch)
    for order in ([[r] for r in range(8)], [[7, 2, 5, 0], [1, 3, 4, 6]]):
        parts = [objective.corrupt(part) for part in split(batch, order)]
        for part, chosen in zip(parts, order, strict=True):
            np.testing.assert_array_equal(part.tokens_BL, whole.tokens_BL[chosen])
            for place, position in enumerate(part.positions_M.tolist()):
                row, column = divmod(position, 2 * LENGTH)
                there = np.searchsorted(whole.positions_M, chosen[row] * 2 * LENGTH + column)
                assert part.targets_M[place] == whole.targets_M[there]
                assert part.weights_M[place] == whole.weights_M[there]
        assert sum(part.denominator for part in parts) == whole.denominator


@pytest.mark.parametrize("keys", [{"weight": "realised"}, {"weight": "none", "normalise": "masked"}], ids=str)
@pytest.mark.parametrize("size", [1, 4, 20])
def test_a_uniform_model_has_loss_log_v_in_every_batch(size: int, keys: dict[str, Any]) -> None:
    objective = block(size, mask_schedule="uniform:0.2,0.9", **keys)
    parts = [objective.corrupt(part) for part in split(rows(0, 8), [[0, 3, 1], [2, 4, 5, 6, 7]])]
    assert loss_of_uniform_model(parts) == pytest.approx(math.log(VOCAB), rel=1e-6)


@pytest.mark.parametrize("schedule", ["uniform:0,1", "uniform:0.45,0.55"])
def test_a_uniform_model_has_loss_log_v_on_average(schedule: str) -> None:
    objective = block(8, mask_schedule=schedule, min_mask_rate=0.02)
    losses = [loss_of_uniform_model([objective.corrupt(rows(64 * k, 64))]) / math.log(VOCAB) for k in range(40)]
    assert abs(np.mean(losses) - 1.0) < 4 * np.std(losses, ddof=1) / math.sqrt(40) < 0.05


def test_the_clean_half_predicts_each_next_token_within_its_document() -> None:
    cuts = [np.array([0, 3, LENGTH], dtype=np.int32), np.array([0, LENGTH], dtype=np.int32)]
    plain = rows(0, 2)
    batch = CleanBatch(plain.tokens_BL, plain.is_maskable_BL, plain.sample_index_B, plain.position, cu_seqlens=cuts)
    for within in (False, True):
        position_M, token_M = next_tokens(batch, within_document=within)
        row_M, column_M = np.divmod(position_M, 2 * LENGTH)
        np.testing.assert_array_equal(row_M * LENGTH + column_M - LENGTH + 1, token_M)
        expected = batch.is_maskable_BL.copy()
        expected[:, 0] = False
        expected[0, 3] &= not within
        np.testing.assert_array_equal(token_M, np.flatnonzero(expected))
    corrupted = block(8, autoregressive_weight=2.5).corrupt(plain)
    is_clean = corrupted.positions_M % (2 * LENGTH) >= LENGTH
    assert set(corrupted.weights_M[is_clean]) == {2.5}
    assert np.all(np.diff(corrupted.positions_M) > 0)
    nll_M = torch.where(torch.from_numpy(is_clean), 2.0, 5.0)
    metrics = block(8, autoregressive_weight=2.5).reduce(nll_M, corrupted)
    assert [total / count for total, count in metrics.values()][::2] == [5.0, 2.0]


def test_the_block_size_is_one_per_step_and_the_last_stage_s_at_the_end() -> None:
    stages = [BlockStage(1, 0.25), BlockStage(4, 0.5), BlockStage(32, 1.0)]
    progress = (0.0, 0.2499, 0.25, 0.49, 0.5, 0.99, 1.0)
    assert [size_at(stages, x) for x in progress] == [1, 1, 4, 4, 32, 32, 32]
    objective = build(name="block_diffusion", block_size=[BlockStage(1, 0.25), BlockStage(8, 0.5), BlockStage(LENGTH)])
    sizes = [objective.corrupt(rows(0, 4, progress=x)).block_size for x in (0.0, 0.25, 0.5)]
    assert sizes == [1, 8, None]


def test_exact_masks_take_the_smallest_uniforms_of_each_block() -> None:
    u = np.array([[0.1, 0.9, 0.3, 0.2, 0.4, 0.8]])
    is_maskable = np.array([[True, True, True, False, True, True]])
    number = np.array([0, 0, 0, 1, 1, 1])
    masked = exact_block_masks(np.array([2, 1]), is_maskable, u, number)
    np.testing.assert_array_equal(masked, [[True, False, True, False, True, False]])


def test_the_exact_estimator_masks_every_count_of_every_block_equally_often() -> None:
    count, size = 400, 4
    batch = CleanBatch(np.zeros((count, 12), dtype=np.int64), np.ones((count, 12), dtype=bool),
                       np.arange(count), BatchPosition(0, count))  # fmt: skip
    (corrupted,) = Estimator("exact", 3, block_size=size).corrupt(batch, MASK)
    counts = (corrupted.tokens_BL[:, :12] == MASK).reshape(-1, size).sum(axis=1)
    np.testing.assert_array_equal(np.bincount(counts, minlength=5), [0, 300, 300, 300, 300])
    row_M, column_M = np.divmod(corrupted.positions_M, 24)
    np.testing.assert_allclose(corrupted.weights_M, size / counts[row_M * 3 + column_M // size])


def test_the_exact_estimator_of_one_block_has_masked_diffusion_s_masks() -> None:
    batch = rows(0, 8)
    (ours,), (theirs,) = (Estimator("exact", 3, block_size=size).corrupt(batch, MASK) for size in (LENGTH, None))
    np.testing.assert_array_equal(ours.tokens_BL, theirs.tokens_BL)
    assert ours.block_size is None

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from megatron_md.diffusion.conditional import ConditionalEstimator, evenly_spaced_counts, masked_answers

MASK = 9


def test_counts_are_evenly_spaced_and_each_alone_uniform() -> None:
    assert evenly_spaced_counts(16, 16, 0.3).tolist() == [5 + j if j < 12 else j - 11 for j in range(16)]
    assert evenly_spaced_counts(5, 4, 0.2).tolist() == [2, 3, 4, 5]
    for n, b in [(3, 16), (5, 4), (40, 16)]:
        seen = np.zeros((b, n + 1))
        for offset in range(n):
            seen[np.arange(b), evenly_spaced_counts(n, b, (offset + 0.37) / n)] += 1
        np.testing.assert_array_equal(seen[:, 1:], 1.0)


def test_monte_carlo_masks_answers_only() -> None:
    copies = masked_answers([1, 2], [3, 4, 5, 6], ConditionalEstimator(draws=32), mask_token_id=MASK, question=5)
    assert copies.tokens_DL.shape == (32, 6) and (copies.tokens_DL[:, :2] == [1, 2]).all()
    np.testing.assert_array_equal(copies.tokens_DL == MASK, copies.is_scored_DL)
    count_D = copies.is_scored_DL.sum(axis=1)
    np.testing.assert_array_equal(np.bincount(count_D, minlength=5), [0, 8, 8, 8, 8])
    np.testing.assert_allclose(copies.weight_D * count_D, 4 / 32)


def test_choices_of_a_question_share_their_draws() -> None:
    estimator = ConditionalEstimator(draws=64)
    masks = [
        masked_answers([1] * prompt, answer, estimator, mask_token_id=MASK, question=question).is_scored_DL[:, prompt:]
        for prompt, answer, question in [(2, [3, 4, 5], 0), (4, [5, 5, 5], 0), (2, [3, 4, 5], 1), (2, [3] * 6, 0)]
    ]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])
    # The longer answer has twice the counts, up to one.
    assert np.abs(masks[3].sum(axis=1) - 2 * masks[0].sum(axis=1)).max() <= 1


def test_one_token_needs_one_draw() -> None:
    copies = masked_answers([1, 2], [3], ConditionalEstimator(), mask_token_id=MASK)
    assert copies.tokens_DL.tolist() == [[1, 2, MASK]]
    assert copies.log_likelihood(np.array([0.7])) == (-0.7, 0.0)


def test_left_to_right_uncovers_one_token_after_the_other() -> None:
    copies = masked_answers([1], [2, 3, 4], ConditionalEstimator("left_to_right"), mask_token_id=MASK)
    assert copies.tokens_DL.tolist() == [[1, MASK, MASK, MASK], [1, 2, MASK, MASK], [1, 2, 3, MASK]]
    assert copies.is_scored_DL.astype(int).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert copies.log_likelihood(np.array([1.0, 2.0, 4.0])) == (-7.0, 0.0)


def test_causal_rows_are_shifted() -> None:
    copies = masked_answers([1], [2, 3], ConditionalEstimator("autoregressive"), mask_token_id=MASK)
    assert copies.tokens_DL.tolist() == [[MASK, 1, 2]] and copies.is_scored_DL.tolist() == [[False, True, True]]


def test_stderr_is_the_spread_of_minibatches() -> None:
    copies = masked_answers([], [3, 4], ConditionalEstimator(draws=8, minibatch=2), mask_token_id=MASK)
    sum_D = np.random.default_rng(0).random(8)
    value, stderr = copies.log_likelihood(sum_D)
    per_draw = 2 / copies.is_scored_DL.sum(axis=1) * sum_D
    assert value == pytest.approx(-per_draw.mean())
    assert stderr == pytest.approx(np.std(per_draw.reshape(4, 2).mean(axis=1), ddof=1) / 2)
    estimates_G = -per_draw.reshape(4, 2).mean(axis=1)
    assert copies.halves(sum_D) == pytest.approx((estimates_G[:2].mean(), estimates_G[2:].mean()))
    assert masked_answers([1], [3], ConditionalEstimator(), mask_token_id=MASK).halves(np.array([0.7])) == (-0.7, -0.7)
    odd = masked_answers([], [3, 4], ConditionalEstimator(draws=6, minibatch=2), mask_token_id=MASK)
    terms_D = 2 / odd.is_scored_DL.sum(axis=1) * sum_D[:6]
    assert odd.halves(sum_D[:6]) == pytest.approx((-terms_D[:2].mean(), -terms_D[2:4].mean()))
    single = masked_answers([], [3, 4], ConditionalEstimator(draws=2, minibatch=2), mask_token_id=MASK)
    assert math.isnan(single.log_likelihood(np.ones(2))[1]) and all(map(math.isnan, single.halves(np.ones(2))))


@pytest.mark.parametrize("size", [3, 8, 50])
def test_micro_batches_have_one_size(size: int) -> None:
    copies = masked_answers([1], [2, 3, 4], ConditionalEstimator(draws=16, seed=2), mask_token_id=MASK)
    batches = list(copies.micro_batches(size))
    assert all(batch.tokens_BL.shape == (size, 4) for batch in batches)
    positions = np.concatenate([batch.positions_M + 4 * size * at for at, batch in enumerate(batches)])
    np.testing.assert_array_equal(positions, np.flatnonzero(copies.is_scored_DL))
    targets = np.concatenate([batch.targets_M for batch in batches])
    np.testing.assert_array_equal(targets, np.tile([1, 2, 3, 4], 16)[positions])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "beam"}, "unknown method 'beam'"),
        ({"draws": 0}, "must be at least 1"),
        ({"draws": 100}, "draws 100 is not a multiple of minibatch 16"),
        ({"guidance": -1.0}, "guidance must be 0 or a positive number, got -1.0"),
        ({"guidance": 1.0, "method": "autoregressive"}, "guidance is for masked models"),
    ],
    ids=str,
)
def test_bad_estimators_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionalEstimator(**keys)


def test_an_empty_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="question 3: an answer without tokens"):
        masked_answers([1], [], ConditionalEstimator(), mask_token_id=MASK, question=3)

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_md.batch import BatchPosition, CleanBatch, CorruptedBatch
from megatron_md.diffusion.estimators import Estimator, neyman_density

MASK, ROWS, LENGTH = 9, 60, 12


def rows(count: int = ROWS) -> CleanBatch:
    generator = np.random.default_rng(0)
    is_maskable = np.arange(LENGTH) < np.where(np.arange(count) % 5 == 0, 7, LENGTH)[:, None]
    return CleanBatch(
        generator.integers(0, MASK, (count, LENGTH)), is_maskable, np.arange(count), BatchPosition(0, count)
    )


def exact(batch: CleanBatch, randomisation: int = 0) -> CorruptedBatch:
    return Estimator("exact", 3).corrupt(batch, MASK, randomisation)[0]


def plain_rows(tokens_RL: np.ndarray) -> CleanBatch:
    count = len(tokens_RL)
    return CleanBatch(tokens_RL, np.ones(tokens_RL.shape, dtype=bool), np.arange(count), BatchPosition(0, count))


def test_exact_counts_are_stratified_over_all_rows() -> None:
    corrupted = exact(plain_rows(np.zeros((40, 20), dtype=np.int64)))
    counts = (corrupted.tokens_BL == MASK).sum(axis=1)
    np.testing.assert_array_equal(np.bincount(counts, minlength=21), [0] + [2] * 20)
    np.testing.assert_allclose(corrupted.mask_rate_B, counts / 20, rtol=1e-6)
    plan = Estimator("exact", 3).plan(np.arange(40), np.full(40, 20), 40)
    np.testing.assert_array_equal(np.sort(counts), counts[np.argsort(plan.stratum_B)])


def test_every_set_of_masked_positions_is_equally_likely() -> None:
    count = 6000
    is_masked_RL = exact(plain_rows(np.zeros((count, 4), dtype=np.int64))).tokens_BL == MASK
    index_R = is_masked_RL @ (1 << np.arange(4))
    # Each count gets a quarter of the rows, divided evenly among its 4, 6, 4 and 1 sets.
    for s in range(1, 16):
        expected = count / 4 / math.comb(4, int(s).bit_count())
        assert abs(np.count_nonzero(index_R == s) - expected) < 4.5 * math.sqrt(expected)


def test_masks_do_not_depend_on_the_layout_but_on_the_randomisation() -> None:
    batch = plain_rows(np.random.default_rng(0).integers(0, MASK, (10, 12)))
    whole = exact(batch)
    for chosen in ([0, 1, 2], [9, 4]):
        part = exact(
            CleanBatch(
                batch.tokens_BL[chosen], batch.is_maskable_BL[chosen], batch.sample_index_B[chosen], batch.position
            )
        )
        np.testing.assert_array_equal(part.tokens_BL, whole.tokens_BL[chosen])
    assert not np.array_equal(exact(batch, 1).tokens_BL, whole.tokens_BL)


def test_complementary_draws_score_every_token_once() -> None:
    batch = rows()
    first, second = Estimator("complementary", 3).corrupt(batch, MASK, 2)
    np.testing.assert_array_equal(first.tokens_BL, Estimator("exact", 3).corrupt(batch, MASK, 2)[0].tokens_BL)
    both = np.sort(np.concatenate([first.positions_M, second.positions_M]))
    np.testing.assert_array_equal(both, np.flatnonzero(batch.is_maskable_BL))
    plan = Estimator("complementary", 3).plan(batch.sample_index_B, batch.is_maskable_BL.sum(axis=1), ROWS, 2)
    # Value 1 for a cross-entropy of 1 everywhere; a lone draw counts in full.
    count_DB = plan.rate_DB * batch.is_maskable_BL.sum(axis=1)
    np.testing.assert_allclose((plan.weight_DB * count_DB).sum(axis=0), 1.0)
    is_lone_B = plan.rate_DB[0] == 1.0
    assert 0 < is_lone_B.sum() < 12 and (plan.rate_DB[1, is_lone_B] == 0.0).all()


def test_neyman_counts_follow_their_density() -> None:
    batch = rows(4000)
    n_B = np.full(4000, LENGTH)
    plan = Estimator("neyman", 1, density=(1.0, 3.0)).plan(batch.sample_index_B, n_B, 4000)
    count_B = np.rint(plan.rate_DB[0] * LENGTH).astype(int)
    # l = 1..6 at 1/24 each and 7..12 at 3/24, stratified: exact up to one row at each edge.
    np.testing.assert_allclose(np.bincount(count_B)[1:], 4000 * np.repeat([1, 3], 6) / 24, atol=1.01)
    np.testing.assert_allclose(plan.weight_DB[0] * count_B, np.where(count_B <= 6, 24 / 12, 24 / 36))


@pytest.mark.parametrize("name", ["stratified_t", "plain"])
def test_rates_cover_all_but_the_smallest(name: str) -> None:
    batch = rows(2000)
    estimator = Estimator(name, 1, min_mask_rate=0.2)  # type: ignore[arg-type]
    plan = estimator.plan(batch.sample_index_B, np.full(2000, LENGTH), 2000)
    t = np.sort(plan.rate_DB[0])
    np.testing.assert_allclose(t, 0.2 + 0.8 * (np.arange(2000) + 0.5) / 2000, atol=3e-4 if name != "plain" else 0.05)
    assert (np.abs(t - 0.2 - 0.8 * (np.arange(2000) + 0.5) / 2000).max() > 3e-3) == (name == "plain")
    (corrupted,) = estimator.corrupt(batch, MASK)
    masked_B = np.bincount(corrupted.positions_M // LENGTH, minlength=2000)
    z = (masked_B - plan.rate_DB[0] * batch.is_maskable_BL.sum(axis=1)).sum() / np.sqrt(2000 * LENGTH * 0.21)
    assert abs(z) < 5.0


def test_density_is_the_spread_at_each_rate() -> None:
    rates = np.repeat([0.1, 0.6, 0.9], 2)
    values = np.array([1.0, 3.0, 5.0, 5.2, 0.0, 2.0])
    found = neyman_density(values, rates, np.full(6, 10), bins=4, floor=0.2)
    # Spreads 1, none, 0.1, 1; their mean stands in for the empty bin.
    np.testing.assert_allclose(found, 0.8 * np.array([1.0, 0.7, 0.1, 1.0]) / 0.7 + 0.2)
    assert neyman_density(np.full(6, 2.0), rates, np.full(6, 10), bins=4) == (1.0,) * 4
    with pytest.raises(ValueError, match="2 pilot draws are too few for 4 bins"):
        neyman_density(np.ones(2), np.array([0.1, 0.9]), np.ones(2), bins=4)

"""Attention annealing opens the pairs of a query and a later key little by little, and no others are ever hidden."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_md.batch import BatchPosition, BoolArray
from megatron_md.diffusion.annealing import hidden_pairs, open_share

LENGTH = 200
LATER = np.triu(np.ones((LENGTH, LENGTH), dtype=bool), 1)


def hidden(progress: float, *, first: int = 64, seed: int = 1, length: int = LENGTH, until: float = 0.5) -> BoolArray:
    is_hidden_LL = hidden_pairs(seed, BatchPosition(first, 8, progress), length, until)
    assert is_hidden_LL is not None
    return is_hidden_LL


def test_the_share_grows_linearly_from_none_to_all() -> None:
    assert [open_share(progress, 0.5) for progress in (0.0, 0.125, 0.25, 0.5, 1.0)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert open_share(0.0, 0.0) == 1.0


def test_it_begins_causal_and_ends_bidirectional() -> None:
    np.testing.assert_array_equal(hidden(0.0), LATER)
    for progress, until in ((0.5, 0.5), (0.7, 0.5), (0.0, 0.0)):
        assert hidden_pairs(1, BatchPosition(64, 8, progress), LENGTH, until) is None


@pytest.mark.parametrize("progress", [0.05, 0.2, 0.45])
def test_only_later_keys_are_hidden_and_as_many_as_they_should(progress: float) -> None:
    is_hidden_LL = hidden(progress)
    assert not (is_hidden_LL & ~LATER).any()
    pairs, share = LATER.sum(), 1 - progress / 0.5
    # Binomial: standard deviation sqrt(pairs share (1 - share)).
    assert abs(is_hidden_LL.sum() - pairs * share) < 5 * np.sqrt(pairs * share * (1 - share))
    # Near keys and far ones alike, and queries early and late.
    distance_LL = np.arange(LENGTH)[None] - np.arange(LENGTH)[:, None]
    for part in (LATER & (distance_LL <= 40), distance_LL > 100, LATER & (np.arange(LENGTH)[:, None] > 150)):
        count = part.sum()
        assert abs(is_hidden_LL[part].sum() - count * share) < 5 * np.sqrt(count * share * (1 - share))


def test_pairs_are_a_function_of_seed_batch_and_place_only() -> None:
    is_hidden_LL = hidden(0.25)
    np.testing.assert_array_equal(hidden(0.25), is_hidden_LL)
    np.testing.assert_array_equal(hidden(0.25, length=60), is_hidden_LL[:60, :60])
    assert not (hidden(0.3) & ~is_hidden_LL).any(), "what is open at a lower share is open at a higher one"
    for other in (hidden(0.25, first=72), hidden(0.25, seed=2)):
        agree = (other == is_hidden_LL)[LATER].mean()
        assert abs(agree - 0.5) < 5 * 0.5 / np.sqrt(LATER.sum())

"""Which positions a context-parallel rank predicts at; that it all adds up, tests/train/test_step.py says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_md.train.row_slice import RowSlice

ROWS, LENGTH = 3, 12


@pytest.mark.parametrize("size", [1, 2, 3, 4, 12])
def test_every_position_is_found_once_and_where_its_token_lies(size: int) -> None:
    tokens_BL = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    positions_M = np.flatnonzero(np.random.default_rng(0).random(ROWS * LENGTH) < 0.5)
    found = np.zeros(len(positions_M), dtype=int)
    for rank in range(size):
        part = RowSlice(rank, size)
        here, own_M = part.find(positions_M, LENGTH)
        found[here] += 1
        assert part.of(tokens_BL).shape == (ROWS, LENGTH // size)
        np.testing.assert_array_equal(part.of(tokens_BL).flatten()[own_M], positions_M[here])
    assert (found == 1).all()


def test_the_slices_are_runs_in_order() -> None:
    tokens_BL = torch.arange(LENGTH)[None]
    parts = [RowSlice(rank, 4).of(tokens_BL) for rank in range(4)]
    assert torch.equal(torch.cat(parts, dim=1), tokens_BL)


def test_one_of_the_ranks_counts() -> None:
    assert [RowSlice(rank, 3).is_first for rank in range(3)] == [True, False, False]


def test_a_slice_without_a_prediction_has_no_positions() -> None:
    here, own_M = RowSlice(1, 2).find(np.array([0, 5, LENGTH + 1]), LENGTH)
    assert len(np.arange(3)[here]) == len(own_M) == 0

"""Packing and grouping: every document once, no row too full, few rows; groups of similar length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_md.data.bins import group_by_length, pack
from megatron_md.data.packing import permutation


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity)))))
def test_packing_holds_every_document_once_and_no_row_too_full(case: tuple[int, list[int]]) -> None:
    capacity, sizes = case
    if not sizes:
        return
    sizes_D = np.array(sizes)
    documents, starts = pack(sizes_D, capacity)
    assert sorted(documents.tolist()) == list(range(len(sizes)))
    filled_R = np.add.reduceat(sizes_D[documents], starts[:-1])
    assert starts[0] == 0 and starts[-1] == len(sizes) and (np.diff(starts) > 0).all()
    assert filled_R.max() <= capacity
    # Best fit leaves no two rows that would fit into one.
    assert len(filled_R) == 1 or np.sort(filled_R)[:2].sum() > capacity


def test_packing_fills_rows() -> None:
    sizes_D = np.random.default_rng(0).integers(10, 400, 5000)
    documents, starts = pack(sizes_D, 1024)
    assert sizes_D.sum() / (1024 * (len(starts) - 1)) > 0.99
    again, _ = pack(sizes_D, 1024)
    np.testing.assert_array_equal(documents, again)


@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_groups_hold_similar_lengths_in_an_order_of_their_own(rows: int) -> None:
    lengths_R = np.random.default_rng(1).integers(1, 512, rows)
    order_R = permutation(rows, "rows", 0)
    grouped_R = group_by_length(order_R, lengths_R, 8, "key", 0)
    assert sorted(grouped_R.tolist()) == list(range(rows))
    if rows < 1000:
        return

    def waste(rows_R: np.ndarray) -> float:
        groups_GB = lengths_R[rows_R[: rows // 8 * 8]].reshape(-1, 8)
        return 1 - float(groups_GB.sum() / (8 * groups_GB.max(axis=1)).sum())

    assert waste(grouped_R) < 0.05 < 0.3 < waste(order_R)
    first_G = lengths_R[grouped_R].reshape(-1, 8)[:, 0]
    assert abs(np.corrcoef(first_G, np.arange(len(first_G)))[0, 1]) < 0.3, "not from long to short"
    assert (grouped_R != group_by_length(order_R, lengths_R, 8, "key", 1)).any()

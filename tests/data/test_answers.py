"""Runs of answers: they give the marks back, and nothing else passes for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_md.data.answers import RUN_DTYPE, runs_in, runs_of, table_of


@given(marks=st.lists(st.booleans(), max_size=40))
def test_runs_give_the_marks_back(marks: list[bool]) -> None:
    runs = runs_of(np.array(marks, dtype=np.bool_))
    again = np.zeros(len(marks), dtype=np.bool_)
    for start, stop in runs.tolist():
        assert start < stop and not again[max(0, start - 1) : stop].any()
        again[start:stop] = True
    assert again.tolist() == marks
    table = table_of(7, runs)
    assert table.nbytes == 12 * len(runs) and (table["document"] == 7).all()
    found = runs_in(table, len(marks))
    assert (found is None) == (not any(marks))
    np.testing.assert_array_equal(runs if found is None else found, runs)


@pytest.mark.parametrize(
    "triples",
    [
        [],
        [(0, 3, 3)],
        [(0, 4, 3)],
        [(0, 3, 11)],
        [(0, 1, 3), (0, 3, 5)],
        [(0, 5, 6), (0, 1, 2)],
        [(0, 1, 2), (1, 4, 5)],
        [(0, 2**32 - 1, 2)],
    ],
)
def test_what_cannot_be_answers(triples: list[tuple[int, int, int]]) -> None:
    assert runs_in(np.array(triples, RUN_DTYPE), 10) is None

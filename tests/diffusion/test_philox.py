"""Many Philox streams at once: numpy's own words, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_md.diffusion.corruption import uniforms, uniforms_of_rows
from megatron_md.diffusion.philox import philox_words


@pytest.mark.parametrize("count", [1, 3, 4, 5, 21, 64])
def test_words_are_those_of_numpy(count: int) -> None:
    key = np.array([2**64 - 3, 0x0123456789ABCDEF], dtype=np.uint64)
    index = np.array([0, 1, 7, 2**32, 2**63 - 1])
    expected = [
        np.random.Philox(counter=np.array([0, g, 0, 0], dtype=np.uint64), key=key).random_raw(count) for g in index
    ]
    np.testing.assert_array_equal(philox_words(key, index, count), expected)


@pytest.mark.parametrize("length", [11, 64, 65])
@pytest.mark.parametrize("rows", [1, 1025])
def test_rows_of_any_length_have_the_uniforms_of_their_streams(rows: int, length: int) -> None:
    index = np.arange(rows) * 3 + 5
    expected = np.stack([uniforms(9, "is_masked", g, length) for g in index.tolist()])
    np.testing.assert_array_equal(uniforms_of_rows(9, "is_masked", index, length), expected)

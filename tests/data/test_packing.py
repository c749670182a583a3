"""The row order: permutations, windows and rows as pure functions of keys."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_md.data.packing import RowOrder, WindowLayout, permutation


def test_permutation_is_a_function_of_the_key() -> None:
    one = permutation(1000, "shards", "corpus", 1, 0)
    assert sorted(one.tolist()) == list(range(1000))
    np.testing.assert_array_equal(one, permutation(1000, "shards", "corpus", 1, 0))
    for other in [("shards", "corpus", 1, 1), ("shards", "corpus", 2, 0), ("rows", "corpus", 1, 0)]:
        assert (permutation(1000, *other) != one).mean() > 0.9


def test_permutation_does_not_change_between_releases() -> None:
    # Recorded once: a change here would change the order of every run.
    assert permutation(10, "documents", "corpus", 7, 0, 0).tolist() == [1, 4, 7, 5, 6, 8, 9, 0, 2, 3]


def test_permutations_are_uniform() -> None:
    counts = np.zeros((5, 5))
    for key in range(4000):
        counts[np.arange(5), permutation(5, "test", key)] += 1
    # Each cell is binomial(4000, 1/5) with standard deviation 25.3.
    assert np.abs(counts - 800).max() < 5 * 25.3


def order(tokens: list[int], **keys: int) -> RowOrder:
    settings = {"seq_length": 16, "window_shards": 2, "seed": 3, **keys}
    return RowOrder(np.array(tokens), corpus="corpus", **settings)


def test_every_row_of_every_epoch_is_placed_once() -> None:
    rows = order([30, 100, 7, 64, 1])
    g = 0
    for epoch in range(6):
        shards = [rows.shards_of_window(epoch, window).tolist() for window in range(3)]
        assert sorted(itertools.chain(*shards)) == [0, 1, 2, 3, 4]
        for window, members in enumerate(shards):
            total = sum([30, 100, 7, 64, 1][shard] for shard in members)
            for local in range(-(-total // 16)):
                place = rows.locate(g)
                assert (place.epoch, place.window, place.row) == (epoch, window, local)
                g += 1


def test_places_do_not_depend_on_what_was_asked_before() -> None:
    tokens = np.random.default_rng(0).integers(1, 500, 23).tolist()
    forward = order(tokens)
    places = [forward.locate(g) for g in range(3000)]
    for g in [2999, 0, 1500, 17]:
        assert order(tokens).locate(g) == places[g]
    assert places[-1].epoch > 5


def test_few_shards_make_one_window_and_any_row_is_found_directly() -> None:
    rows = order([30, 100], window_shards=8)
    per_epoch = -(-130 // 16)
    place = rows.locate(10**15 * per_epoch + 4)
    assert (place.epoch, place.window, place.row) == (10**15, 0, 4)


@pytest.mark.parametrize("lengths", [[0], [1], [15], [16], [200], [0, 0, 0], [5, 0, 40, 1, 15, 16, 17, 3]])
def test_pieces_cover_every_document_once(lengths: list[int]) -> None:
    layout = WindowLayout(np.array(lengths), 16, "key")
    covered = [np.zeros(length + 1, dtype=int) for length in lengths]
    sizes = []
    for row in range(layout.rows):
        pieces = layout.pieces(row)
        for piece in pieces:
            assert piece.start < piece.stop
            covered[piece.document][piece.start : piece.stop] += 1
        sizes.append(sum(piece.stop - piece.start for piece in pieces))
    assert all((count == 1).all() for count in covered)
    total = sum(lengths) + len(lengths)
    assert sorted(sizes, reverse=True) == [16] * (total // 16) + [total % 16] * (total % 16 > 0)

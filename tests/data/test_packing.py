"""The row order: permutations, windows and rows as pure functions of keys."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_md.data.packing import RowOrder, RowPlace, Span, WindowLayout, permutation


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


SHARDS = {
    "several windows": [30, 100, 7, 64, 1],
    "windows shorter than a row": [1, 2, 1, 1, 3, 9, 1, 40, 1, 1],
    "whole rows": [16, 32, 48],
}


@pytest.mark.parametrize("window_shards", [1, 2, 8])
@pytest.mark.parametrize("name", SHARDS)
def test_every_token_of_every_epoch_is_placed_once(name: str, window_shards: int) -> None:
    tokens = SHARDS[name]
    rows = order(tokens, window_shards=window_shards)
    assert rows.rows_per_epoch == -(-sum(tokens) // 16)
    for epoch in range(6):
        windows = [rows.shards_of_window(epoch, window) for window in range(-(-len(tokens) // window_shards))]
        assert sorted(np.concatenate(windows).tolist()) == list(range(len(tokens)))
        placed = [np.zeros(sum(tokens[shard] for shard in members), dtype=int) for members in windows]
        sizes, begins = [], []
        for local in range(rows.rows_per_epoch):
            place = rows.locate(epoch * rows.rows_per_epoch + local)
            assert place.epoch == epoch
            for span in place.spans:
                placed[span.window][span.start : span.stop] += 1
            sizes.append(sum(span.stop - span.start for span in place.spans))
            begins.append(place.spans[0].window)
            # A row that runs on does so from the end of one window to the start of the next.
            for one, other in itertools.pairwise(place.spans):
                assert (other.window, other.start) == (one.window + 1, 0) and one.stop == len(placed[one.window])
        assert all((count == 1).all() for count in placed)
        assert begins == sorted(begins), "windows come one after the other"
        assert sorted(sizes, reverse=True) == [16] * (sum(tokens) // 16) + [sum(tokens) % 16] * (sum(tokens) % 16 > 0)


def test_places_do_not_depend_on_what_was_asked_before() -> None:
    tokens = np.random.default_rng(0).integers(1, 500, 23).tolist()
    forward = order(tokens)
    places = [forward.locate(g) for g in range(3000)]
    for g in [2999, 0, 1500, 17]:
        assert order(tokens).locate(g) == places[g]
    assert places[-1].epoch > 5


@pytest.mark.parametrize("window_shards", [2, 8])
def test_any_row_is_found_directly_however_late(window_shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(1, 500, 23).tolist()
    drawn: list[tuple[str | int, ...]] = []

    def counted(count: int, *key: str | int) -> np.ndarray:
        drawn.append(key)
        return permutation(count, *key)

    monkeypatch.setattr("megatron_md.data.packing.permutation", counted)
    rows = order(tokens, window_shards=window_shards)
    place = rows.locate(10**15 * rows.rows_per_epoch + 4)
    assert place.epoch == 10**15 and place.spans[0].window == 0
    assert drawn == [("shards", "corpus", 3, 10**15), ("rows", "corpus", 3, 10**15, 0)]


def test_places_do_not_change_between_releases() -> None:
    # Recorded once: a change here would change the order of every run.
    rows = order([30, 100, 7, 64, 1])
    assert rows.locate(14) == RowPlace(1, (Span(0, 16, 31), Span(1, 0, 1)))
    assert rows.locate(19) == RowPlace(1, (Span(1, 33, 49),))


@pytest.mark.parametrize("lengths", [[0], [1], [15], [16], [200], [0, 0, 0], [5, 0, 40, 1, 15, 16, 17, 3]])
@pytest.mark.parametrize("step", [1, 7, 16, 1000])
def test_pieces_cover_every_document_once(lengths: list[int], step: int) -> None:
    layout = WindowLayout(np.array(lengths), np.arange(len(lengths)), "key")
    covered = [np.zeros(length + 1, dtype=int) for length in lengths]
    total = sum(lengths) + len(lengths)
    for start in range(0, total, step):
        pieces = layout.pieces(start, min(start + step, total))
        for document, begin, end in pieces:
            assert begin < end
            covered[document][begin:end] += 1
        assert sum(end - begin for _, begin, end in pieces) == min(step, total - start)
    assert all((count == 1).all() for count in covered)

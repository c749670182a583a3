"""The mixture: shares kept within a row everywhere, any row at once, each corpus in its own order and epochs."""

from __future__ import annotations

import hashlib
import itertools
from fractions import Fraction

import numpy as np
import pytest

from megatron_md.batch import BatchPosition
from megatron_md.config import CorpusConfig, DataConfig
from megatron_md.data.mixture import (
    LONGEST_PERIOD,
    MixtureSchedule,
    MixtureStream,
    open_stream,
    whole_units,
)
from megatron_md.data.stream import Prefetcher, SequenceStream, micro_batches
from tests.data.small_corpus import WriteCorpus, random_documents

L = 16
WEIGHTS = [
    [1.0],
    [0.5, 0.5],
    [0.7, 0.2, 0.1],
    [3.0, 1.0, 0.0, 5.0],
    [0.9, 0.05, 0.03, 0.01, 0.01],
    [1.0] * 7,
    [0.61803, 0.2, 0.1, 0.08197],
    [1 / 3, 1 / 7, 0.2],
    np.random.default_rng(0).integers(1, 400, 9).tolist(),
]


def lags(points: list[list[tuple[int, float]]], rows: int) -> np.ndarray:
    """Rows [rows, corpora] that each corpus is due but has not been served after each row; below 0: it is ahead."""
    corpus_B, row_B = MixtureSchedule(points).locate(range(rows))
    corpora = np.arange(len(points))
    shares_BK = np.empty((rows, len(points)))
    changes = sorted({0, *(g for own in points for g, _ in own)})
    for start in changes:
        units = whole_units([next((weight for g, weight in reversed(own) if g <= start), 0.0) for own in points])
        shares_BK[start:] = np.array(units) / sum(units)
    for corpus in corpora:
        own_rows = row_B[corpus_B == corpus]
        np.testing.assert_array_equal(own_rows, np.arange(len(own_rows)))
    return np.cumsum(shares_BK, axis=0) - np.cumsum(corpus_B[:, None] == corpora, axis=0)


def random_points(seed: int, corpora: int) -> list[list[tuple[int, float]]]:
    """Up to 30 changes of all weights, some a row apart, some far; some weights are 0."""
    random = np.random.default_rng(seed)
    changes = [0, *np.cumsum(random.integers(1, [4, 20, 100][seed % 3], 30)).tolist()]
    weights = random.integers(0, [3, 10, 100][seed // 3 % 3], (corpora, len(changes)))
    weights[0] += weights.sum(axis=0) == 0
    return [list(zip(changes, map(float, own), strict=True)) for own in weights.tolist()]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_are_kept_within_one_row_at_every_row(weights: list[float]) -> None:
    lags_BK = lags([[(0, weight)] for weight in weights], 20_000)
    assert np.abs(lags_BK).max() < 1.0


@pytest.mark.parametrize("seed", range(9))
def test_random_shares_are_kept_within_one_row(seed: int) -> None:
    random = np.random.default_rng(seed)
    units = [1, *random.integers(0, [3, 30, 300][seed % 3], random.integers(0, 12)).tolist()]
    assert np.abs(lags([[(0, unit)] for unit in units], 3 * sum(units))).max() < 1.0


@pytest.mark.parametrize("corpora", [2, 3, 4, 5, 12])
def test_shares_are_kept_at_every_row_across_changes(corpora: int) -> None:
    for seed in range(9):  # all kinds of changes with all kinds of weights
        points = random_points(seed, corpora)
        lags_BK = lags(points, points[0][-1][0] + 300)
        # Never a row ahead; never a row behind where that can be had without looking ahead.
        assert lags_BK.min() > -1.0 + 1e-9
        assert lags_BK.max() < (1.0 - 1e-9 if corpora <= 3 else 1.5)


@pytest.mark.parametrize("corpora", [3, 4, 12])
def test_no_rule_keeps_four_corpora_within_a_row_without_looking_ahead(corpora: int) -> None:
    """Weights set against any rule: those of the corpora that have not been served, and equal ones again afterwards."""
    points: list[list[tuple[int, float]]] = [[(0, 1.0)] for _ in range(corpora)]
    for g in range(1, corpora):
        served = MixtureSchedule(points).locate(range(g))[0].tolist()
        assert len(set(served)) == g, "a rule that serves one twice leaves more corpora behind"
        for corpus, own in enumerate(points):
            own.append((g, 1.0 if g == corpora - 1 or corpus not in served else 0.0))
    lags_BK = lags(points, 20 * corpora)
    assert lags_BK[corpora - 2].max() == pytest.approx(sum(1 / n for n in range(2, corpora + 1)))
    assert np.abs(lags_BK[5 * corpora :]).max() < 1.0


def test_rows_of_each_corpus_come_once_and_in_order() -> None:
    schedule = MixtureSchedule([[(0, 0.7)], [(0, 0.2), (500, 0.5)], [(300, 0.1)]])
    corpus_B, row_B = schedule.locate(range(2000))
    for corpus in range(3):
        rows = row_B[corpus_B == corpus]
        assert rows.tolist() == list(range(len(rows))) and len(rows) > 100


def test_any_row_is_found_without_the_ones_before() -> None:
    points = [[(0, 0.61803), (10_000, 0.1)], [(0, 0.38197)]]
    corpus_B, row_B = MixtureSchedule(points).locate(range(250_000))
    for g in [0, 1, 9_999, 10_000, 99_999, 100_000, 119_999, 249_999]:
        assert [part.tolist() for part in MixtureSchedule(points).locate([g])] == [[corpus_B[g]], [row_B[g]]]
    corpus, row = MixtureSchedule([[(0, 3)], [(0, 1)]]).locate([4 * 10**14 + 1])
    assert (corpus[0], row[0]) in [(0, 3 * 10**14 + 1), (1, 10**14), (0, 3 * 10**14)]
    # The same far behind a change, against the rows that are counted one by one.
    points = [[(0, 3), (50, 7)], [(0, 1), (17, 5)], [(29, 4)]]
    schedule = MixtureSchedule(points)
    corpus_B, row_B = schedule.locate(range(50, 10_000))
    later_B = schedule.locate(np.arange(50 + 16 * 10**12, 10_000 + 16 * 10**12))
    np.testing.assert_array_equal(later_B[0][16:], corpus_B[16:])
    np.testing.assert_array_equal(later_B[1][16:], (row_B + np.array([7, 5, 4])[corpus_B] * 10**12)[16:])


def test_weights_change_at_the_rows_that_are_given() -> None:
    corpus_B, _ = MixtureSchedule([[(0, 7), (13, 0)], [(0, 3)]]).locate(range(40))
    assert 0 in corpus_B[10:13] and (corpus_B[13:] == 1).all()
    # Within one period too; the denominator of a share does not matter.
    corpus_B, _ = MixtureSchedule([[(0, 0.61803), (13, 0), (14, 1)], [(0, 0.38197), (14, 0)]]).locate(range(40))
    assert corpus_B[13] == 1 and (corpus_B[14:] == 0).all()


def test_the_past_does_not_depend_on_what_comes() -> None:
    for seed in range(10):
        points = random_points(seed, 5)
        before = MixtureSchedule(points).locate(range(400))
        for g in [1, 37, points[0][9][0], points[0][20][0]]:
            earlier = [[point for point in own if point[0] < g] for own in points]
            changed = MixtureSchedule([[*own, (g, weight)] for own, weight in zip(earlier, range(5), strict=True)])
            for one, other in zip(before, changed.locate(range(400)), strict=True):
                np.testing.assert_array_equal(one[:g], other[:g])


def test_units_are_exact_to_five_decimals_and_never_lose_a_corpus() -> None:
    assert whole_units([0.12345, 0.87655]) == (2469, 17531)
    assert whole_units([7e-9, 1.0, 0.0]) == (1, 100_000, 0)
    for weights in [[1 / 3, 1 / 7, 0.2], [0.1234567, 0.9]]:
        units = whole_units(weights)
        shares = [Fraction(unit, sum(units)) for unit in units]
        assert sum(units) <= LONGEST_PERIOD + len(units)
        assert np.allclose([float(share) for share in shares], np.array(weights) / sum(weights), atol=2e-5)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[(0, 0.0)], [(0, 0.0)]], "at row 0 all weights are 0"),
        ([[(5, 1.0)]], "at row 0 all weights are 0"),
        ([[(0, 1.0), (70, 0.0)]], "at row 70 all weights are 0"),
        ([[(0, 1.0), (9, 2.0), (9, 1.0)]], r"\[0, 9, 9\] at which a weight changes must ascend"),
    ],
)
def test_impossible_schedules_are_refused(points: list[list[tuple[int, float]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureSchedule(points)


def mixture(write_tokens: WriteCorpus, **keys: int) -> MixtureStream:
    """Three corpora whose tokens tell which one they are from."""
    documents = random_documents(120)
    streams = []
    for number in range(3):
        own = [[token % 300 + 4 + 300 * number for token in tokens] for tokens in documents[: 40 * (number + 1)]]
        manifest = write_tokens(own, name=f"corpus{number}", shard_tokens=300, block_bytes=200)
        streams.append(SequenceStream(manifest, seed=5, seq_length=L, window_shards=2, **keys))
    return MixtureStream(streams, [[(0, 0.5)], [(0, 0.3)], [(0, 0.2), (320, 0.7)]])


def test_rows_come_from_their_corpora(write_tokens: WriteCorpus) -> None:
    mixed = mixture(write_tokens)
    rows = mixed.rows(range(600))
    corpus_B, row_B = mixed.schedule.locate(range(600))
    assert rows.sample_index_B.tolist() == list(range(600))
    for b in range(0, 600, 7):
        alone = mixed.streams[corpus_B[b]].rows([row_B[b]])
        np.testing.assert_array_equal(rows.tokens_BL[b], alone.tokens_BL[0])
        np.testing.assert_array_equal(rows.is_maskable_BL[b], alone.is_maskable_BL[0])
        np.testing.assert_array_equal(rows.cu_seqlens[b], alone.cu_seqlens[0])
        text = rows.tokens_BL[b][rows.tokens_BL[b] > 3]
        assert ((text - 4) // 300 == corpus_B[b]).all()
    epochs = row_B.max() // np.array([stream.rows_per_epoch for stream in mixed.streams])
    assert len(set(epochs.tolist())) > 1, "the corpora must be in epochs of their own"


def digests(mixed: MixtureStream, data_size: int, micro_batch_size: int, first: int, depth: int) -> list[str]:
    """A hash per global batch of 16 rows up to step 40, read ahead by `depth`."""

    def global_batches() -> itertools.chain[str]:
        for step in range(first, 40):
            position = BatchPosition(16 * step, 16)
            parts = [
                micro_batches(mixed, position, micro_batch_size, data_rank=rank, data_size=data_size)
                for rank in range(data_size)
            ]
            ordered = [part for group in zip(*parts, strict=True) for part in group]
            digest = hashlib.sha256()
            for name in ("tokens_BL", "is_maskable_BL", "sample_index_B"):
                digest.update(np.concatenate([getattr(part, name) for part in ordered]).tobytes())
            for part in ordered:
                digest.update(b"".join(cuts.tobytes() for cuts in part.cu_seqlens or []))
            yield digest.hexdigest()

    prefetcher = Prefetcher(global_batches(), depth=depth)
    found = list(prefetcher)
    prefetcher.close()
    return found


def test_global_batches_are_the_same_for_any_layout_prefetch_and_restart(write_tokens: WriteCorpus) -> None:
    reference = digests(mixture(write_tokens), 1, 16, 0, 0)
    assert len(set(reference)) == 40
    for data_size, micro_batch_size, first, depth in [(2, 4, 0, 1), (4, 4, 0, 2), (8, 1, 0, 50), (2, 2, 21, 3)]:
        assert digests(mixture(write_tokens), data_size, micro_batch_size, first, depth) == reference[first:]


def test_open_stream_reads_the_config(write_tokens: WriteCorpus) -> None:
    manifests = [write_tokens(random_documents(20, seed=n), name=f"corpus{n}") for n in range(2)]
    corpora = [CorpusConfig(str(manifests[0].directory), 3.0), CorpusConfig("x/manifest.json", [(0, 0), (8, 1.0)], "b")]
    config = DataConfig(train=corpora, seq_length=L)
    assert [corpus.label for corpus in config.corpora()] == [str(manifests[0].directory), "b"]
    mixed = open_stream(config, manifests, seed=1)
    assert mixed.schedule.locate(range(100))[0].tolist().count(1) == (100 - 8) // 4
    assert mixed.state(9)["corpus"][1] == {"corpus": manifests[1].sha256, "weight": [[0, 0], [8, 1.0]]}
    assert mixed.state(8)["corpus"][1] == {"corpus": manifests[1].sha256, "weight": [[0, 0]]}
    single = open_stream(DataConfig(train="one", seq_length=L), manifests[:1], seed=1)
    assert isinstance(single, SequenceStream) and single.state(0)["corpus"] == manifests[0].sha256

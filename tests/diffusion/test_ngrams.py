"""N-gram counts: against a dictionary of all of them, across pieces and documents, and as a sample."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_md.diffusion import ngrams
from megatron_md.diffusion.ngrams import ORDERS, By, NgramCounter, weights_of, weights_stderr


def zipf_documents(count: int, seed: int = 0, longest: int = 400) -> list[np.ndarray]:
    """Documents with many rare and a few frequent n-grams; some are empty or shorter than an n-gram."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, longest, count)
    return [np.minimum(random.zipf(1.4, n), 3000).astype(np.uint16) for n in lengths]


def ngram_weights(documents: list[np.ndarray], orders: tuple[int, ...] = ORDERS, by: By = "types") -> dict[int, float]:
    counter = NgramCounter(orders)
    counter.add(documents)
    return weights_of(counter.counts(), by)


def counted(documents: list[np.ndarray], order: int) -> Counter[tuple[int, ...]]:
    """Occurrences of every n-gram."""
    found: Counter[tuple[int, ...]] = Counter()
    for document in documents:
        tokens = document.tolist()
        found.update(zip(*(tokens[first:] for first in range(order)), strict=False))
    return found


@pytest.mark.parametrize("chunk", [64, 1 << 18])
@pytest.mark.parametrize("min_count", [1, 2, 5])
def test_counts_are_those_of_a_dictionary(chunk: int, min_count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(ngrams, "_PENDING", 1000)
    documents = zipf_documents(150)
    counter = NgramCounter([1, *ORDERS], min_count)
    for first in range(0, 150, 40):
        counter.add(documents[first : first + 40])
    assert counter.tokens == sum(map(len, documents))
    for order, found in counter.counts().items():
        expected = counted(documents, order)
        often = [count for count in expected.values() if count >= min_count]
        assert (found.positions, found.types, found.occurrences) == (sum(expected.values()), len(often), sum(often))
        assert (found.kept, found.types_stderr, found.occurrences_stderr) == (1.0, 0.0, 0.0)


def test_ngrams_do_not_cross_documents() -> None:
    apart = NgramCounter([2], 1)
    apart.add([np.array([1, 2]), np.array([3]), np.array([], dtype=np.int64), np.array([4, 5, 6])])
    assert apart.counts()[2].positions == 3 == apart.counts()[2].types


def test_the_order_of_tokens_matters() -> None:
    counter = NgramCounter([2, 3], 2)
    counter.add([np.array(tokens) for tokens in ([1, 2, 3], [3, 2, 1], [2, 1, 3], [1, 2, 3])])
    assert counter.counts()[2].types == 3  # (1, 2), (2, 3) and (2, 1)
    assert counter.counts()[3].types == 1


def test_weights_are_shares_by_types_or_by_occurrences() -> None:
    documents = [np.array([1, 2, 3])] * 5 + [np.array([1, 2])] * 10
    # Bigrams (1, 2) fifteen times and (2, 3) five times, the trigram five times.
    assert ngram_weights(documents, orders=(2, 3)) == pytest.approx({2: 2 / 3, 3: 1 / 3})
    assert ngram_weights(documents, orders=(2, 3), by="occurrences") == pytest.approx({2: 20 / 25, 3: 5 / 25})


@pytest.mark.parametrize("capacity", [3000, 10_000])
def test_a_sample_keeps_its_bound_and_its_standard_error(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "_PENDING", 2000)
    documents = zipf_documents(300)
    exact, sampled = NgramCounter(), NgramCounter(capacity=capacity)
    exact.add(documents)
    sampled.add(documents)
    errors = []
    for order, found in sampled.counts().items():
        truth = exact.counts()[order]
        assert found.kept < 1.0 and len(sampled._samples[order]._keys) <= capacity
        assert found.positions == truth.positions
        errors += [(found.types - truth.types) / found.types_stderr]
        errors += [(found.occurrences - truth.occurrences) / found.occurrences_stderr]
    # Ten standardised errors: none far out, and their size is neither far too small nor far too large.
    assert np.max(np.abs(errors)) < 3.5
    assert 0.4 < np.sqrt(np.mean(np.square(errors))) < 1.8


def test_standard_error_of_a_share_is_its_spread_over_corpora() -> None:
    errors = []
    for seed in range(60):
        # Other names for the tokens have other hashes, so that each corpus is sampled anew.
        names = np.random.default_rng(1000 + seed).permutation(4096)
        documents = [names[document] for document in zipf_documents(12, seed)]
        exact, sampled = NgramCounter([1, 2, 3], 2), NgramCounter([1, 2, 3], 2, capacity=100)
        exact.add(documents)
        sampled.add(documents)
        truth, found = weights_of(exact.counts()), weights_of(sampled.counts())
        stderr = weights_stderr(sampled.counts())
        errors.append((found[2] - truth[2]) / stderr[2])
    assert abs(np.mean(errors)) < 0.5
    assert 0.7 < np.std(errors) < 1.5


def test_result_does_not_depend_on_the_order_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "_PENDING", 500)
    documents = zipf_documents(60)
    forward, backward = NgramCounter(capacity=300), NgramCounter(capacity=300)
    forward.add(documents)
    backward.add(documents[::-1])
    assert forward.counts() == backward.counts()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no n-gram recurs"):
        ngram_weights([])
    with pytest.raises(ValueError, match="no n-gram recurs"):
        ngram_weights([np.arange(1000)])
    with pytest.raises(ValueError, match="orders from 1 up"):
        NgramCounter([0, 2])
    with pytest.raises(ValueError, match="orders from 1 up"):
        NgramCounter([])
    with pytest.raises(ValueError, match="min_count must be at least 1"):
        NgramCounter(min_count=0)
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        NgramCounter(capacity=0)
    with pytest.raises(ValueError, match="list of token ids"):
        NgramCounter().add([np.zeros((2, 2), dtype=np.int64)])
    with pytest.raises(ValueError, match="list of token ids"):
        NgramCounter().add([np.array([0.5, 1.0])])

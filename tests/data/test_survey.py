"""Whole corpora: every damage is noticed; counts and entropies agree with closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_md.data.shards import ShardReader
from megatron_md.data.survey import document_lengths, token_counts, unigram_entropy, verify_corpus
from tests.data.small_corpus import EOS, WriteCorpus, flip_byte, random_documents


def test_every_flipped_byte_of_a_tar_is_noticed(write_tokens: WriteCorpus, tmp_path: Path) -> None:
    manifest = write_tokens([[5, 6, 7], [8, 9]])
    path = tmp_path / "corpus" / "shard-000000.tar"
    sound = path.read_bytes()
    start = int(ShardReader(manifest, 0).index["offset"][0])
    for offset in [0, 300, start, start + 5, start + 6, start + 9, start + 10, start + 512 + 40, len(sound) - 1]:
        flip_byte(path, offset)
        problems = verify_corpus(manifest)
        assert len(problems) == 1
        if start <= offset < start + 10:
            assert f"shard-000000.tar: document {0 if offset < start + 6 else 1} " in problems[0]
        else:
            assert "its sha256 differs" in problems[0]
        path.write_bytes(sound)
    assert verify_corpus(manifest) == []


def test_counts_and_lengths(write_tokens: WriteCorpus) -> None:
    documents = random_documents(50)
    manifest = write_tokens(documents, shard_tokens=300, block_bytes=100)
    expected = np.bincount([token for tokens in documents for token in [*tokens, EOS]], minlength=1000)
    np.testing.assert_array_equal(token_counts(manifest), expected)
    assert document_lengths(manifest).tolist() == [len(tokens) for tokens in documents]


def test_unigram_entropy_of_a_uniform_corpus_is_the_logarithm(write_tokens: WriteCorpus) -> None:
    # Seven tokens and <eos>, each once per document: eight equally frequent tokens.
    manifest = write_tokens([list(range(10, 17))] * 5)
    assert unigram_entropy(manifest) == pytest.approx(math.log(8), abs=1e-12)

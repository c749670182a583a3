"""Corpora made of given token lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_md.data.shards import Manifest
from megatron_md.data.writer import Tokenised, Vocabulary, write_corpus
from tests.data.small_corpus import EOS, MASK, PAD, WriteCorpus


@pytest.fixture
def write_tokens(tmp_path: Path) -> WriteCorpus:
    """Write documents given as token lists: `write_tokens([[5, 6], [7]], shard_tokens=2, vocab_size=100)`."""

    def write(
        documents: Sequence[Sequence[int]], vocab_size: int = 1000, name: str = "corpus", **sizes: int
    ) -> Manifest:
        batch = [Tokenised(np.array(tokens, dtype=np.int64), len(tokens)) for tokens in documents]
        return write_corpus([batch], Vocabulary(vocab_size, EOS, MASK, PAD, "0" * 64), tmp_path / name, **sizes)

    return write

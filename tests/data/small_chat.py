"""Small chat corpora for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_md.data.shards import Manifest, ShardReader
from megatron_md.data.writer import Tokenised, Vocabulary, write_corpus
from tests.data.small_corpus import EOS, MASK, PAD

Dialogue = tuple[list[int], list[tuple[int, int]]]


def random_dialogues(count: int, longest: int = 30, vocab_size: int = 200, seed: int = 0) -> list[Dialogue]:
    """Tokens of dialogues (3 to `longest`) and where their answers lie, one or two each, the last at the end."""
    random = np.random.default_rng(seed)
    dialogues = []
    for _ in range(count):
        size = int(random.integers(3, longest + 1))
        start = int(random.integers(1, size))
        runs = [(start, size)]
        if start > 4 and random.random() < 0.5:
            runs.insert(0, (1, int(random.integers(2, start - 1))))
        dialogues.append((random.integers(4, vocab_size, size).tolist(), runs))
    return dialogues


def write_chat_corpus(
    folder: Path, dialogues: list[Dialogue], vocab_size: int = 200, shard_tokens: int = 300, eos: int = EOS
) -> Manifest:
    """A corpus of these dialogues."""
    batch = [Tokenised(np.array(tokens), 4 * len(tokens), answers=np.array(runs)) for tokens, runs in dialogues]
    vocabulary = Vocabulary(vocab_size, eos, MASK, PAD, "0" * 64)
    return write_corpus([batch], vocabulary, folder, shard_tokens=shard_tokens)


def all_dialogues(manifest: Manifest) -> list[Dialogue]:
    """Every dialogue, in file order."""
    readers = [ShardReader(manifest, number) for number in range(len(manifest.shards))]
    return [
        (reader.document(d).tolist(), [(start, stop) for start, stop in reader.answers(d).tolist()])
        for reader in readers
        for d in range(len(reader.index))
    ]

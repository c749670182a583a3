"""Small corpora for tests: made-up code, and random token lists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_md.data.shards import Manifest, ShardReader

EOS, MASK, PAD = 2, 3, 1
WORDS = ["alpha", "beta", "gamma", "delta", "value", "index", "token", "window", "shard", "row", "noise", "clean",
         "text"]  # fmt: skip

WriteCorpus = Callable[..., Manifest]


def flip_byte(path: Path, offset: int) -> None:
    """Damage a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def made_up_code(number: int) -> str:
    """Python-like text with indentation, blank lines, digits and a little Unicode; a function of the number."""
    random = np.random.default_rng(number)
    lines = [
        f"def function_{number}({', '.join(random.choice(WORDS, 2))}):",
        f'    """Return {number} – a naïve test."""',
    ]
    for _ in range(int(random.integers(3, 30))):
        name, other = random.choice(WORDS, 2)
        lines.append(" " * 4 * int(random.integers(1, 4)) + f"{name} = {other}[{random.integers(100)}] + self.{name}")
    return "\n".join(lines) + "\n\n\n"


def random_documents(count: int, longest: int = 60, vocab_size: int = 1000, seed: int = 0) -> list[list[int]]:
    """Token lists of lengths 0 .. longest - 1, without `<eos>`."""
    random = np.random.default_rng(seed)
    return [random.integers(4, vocab_size, random.integers(0, longest)).tolist() for _ in range(count)]


def all_documents(manifest: Manifest) -> list[list[int]]:
    """Tokens of every document, in file order."""
    readers = [ShardReader(manifest, number) for number in range(len(manifest.shards))]
    return [reader.document(d).tolist() for reader in readers for d in range(len(reader.index))]

"""What takes reading a whole corpus: whether every hash and document is sound, counts of tokens, all lengths."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_md.data.remote import RemoteError
from megatron_md.data.shards import Manifest, ShardError, ShardReader, read_index
from megatron_md.data.subset import choose
from megatron_md.data.tar import TarError, read_members
from megatron_md.errors import UserError


def verify_corpus(manifest: Manifest) -> list[str]:
    """Check every hash, every document's crc32 and every token id of a corpus, and the answers of dialogues.

    Returns:
        One line per problem, naming the file and the document; empty for a sound corpus.
    """
    problems: list[str] = []
    for number, shard in enumerate(manifest.shards):
        try:
            reader = ShardReader(manifest, number)
        except ShardError as error:
            path, index = manifest.directory / shard.name, read_index(manifest, shard)
            problems.append(f"{error}{_structure(path, index) if os.path.isfile(path) and index is not None else ''}")
            continue
        except RemoteError as error:
            problems.append(str(error))
            continue
        with reader.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        damaged = _damaged_documents(reader, manifest)
        problems += damaged
        if sha256 != shard.sha256 and not damaged:
            problems.append(
                f"{reader.path}: damaged outside its documents (tar headers or lengths): its sha256 differs"
                f"{_structure(reader.path, reader.index)}"
            )
    return problems


def _damaged_documents(reader: ShardReader, manifest: Manifest) -> list[str]:
    problems, vocab_size = [], manifest.vocab_size
    for number in range(len(reader.index)):
        try:
            tokens = reader.document(number)
            if manifest.kind == "chat":
                reader.answers(number)
        except ShardError as error:
            problems.append(str(error))
            continue
        if tokens.size and int(tokens.max()) >= vocab_size:
            problems.append(f"{reader.path}: document {number} holds a token outside the vocabulary of {vocab_size}")
    return problems


def _structure(path: Path, index: npt.NDArray[np.void]) -> str:
    """What the tar's structure says about the damage, with the documents that lie behind it."""
    try:
        with path.open("rb") as file:
            for _ in read_members(file, path):
                pass
    except TarError as error:
        behind = int(np.searchsorted(index["offset"], error.offset))
        place = f"before document {behind}" if behind < len(index) else f"after document {len(index) - 1}"
        return f"; {error.problem} at byte {error.offset}, {place}"
    return ""


def token_counts(manifest: Manifest, max_tokens: int | None = None) -> npt.NDArray[np.int64]:
    """Occurrences [vocab_size] of every token, one `<eos>` per document of a text corpus included.

    Args:
        manifest: the corpus.
        max_tokens: count in the documents that `megatron_md.data.subset.choose` takes only.
    """
    counts, subset = np.zeros(manifest.vocab_size, dtype=np.int64), choose(manifest, max_tokens)
    for number in subset.shards.tolist():
        reader = ShardReader(manifest, number)
        for block in reader.blocks(subset.numbers([number], [len(reader.index)])):
            found = np.bincount(block, minlength=manifest.vocab_size)
            if len(found) > manifest.vocab_size:
                raise UserError(
                    f"{manifest.location}: a token lies outside the vocabulary; check it with `data verify`"
                )
            counts += found
    counts[manifest.eos_id] += subset.documents if manifest.kind == "text" else 0
    return counts


def unigram_entropy(manifest: Manifest, max_tokens: int | None = None) -> float:
    """Entropy in nats per token of the corpus' token distribution, `<eos>` included: H = -sum_v p_v log p_v.

    A model that knows nothing but token frequencies has this cross-entropy on the corpus. See `token_counts`.
    """
    counts = token_counts(manifest, max_tokens)
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def document_lengths(manifest: Manifest) -> npt.NDArray[np.int64]:
    """Tokens [documents] of every document, in file order."""
    lengths = [ShardReader(manifest, number).index["tokens"] for number in range(len(manifest.shards))]
    return np.concatenate(lengths).astype(np.int64)

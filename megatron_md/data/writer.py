"""Writer of shards: tokenised documents in, a folder of tar shards with a manifest out, complete or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_md.data.corpus import Rejection
from megatron_md.data.shards import (
    FORMAT,
    INDEX_DTYPE,
    MANIFEST_NAME,
    REJECTED_NAME,
    Manifest,
    Shard,
    content_hash,
    load_manifest,
)
from megatron_md.data.tokenizer import Tokenizer

BLOCK_BYTES = 1 << 20
SHARD_TOKENS = 1 << 24
OWN_FILES = re.compile(r"shard-\d{6}\.(tar|index\.npy)|manifest\.json|rejected\.jsonl")

Tokens = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Tokenised:
    """A document's tokens [n], without `<eos>`, and the size of its text in UTF-8 bytes."""

    tokens: Tokens
    text_bytes: int


Batch = list[Tokenised | Rejection]


@dataclass(frozen=True)
class Vocabulary:
    """What a manifest says about its tokens."""

    size: int
    eos_id: int
    mask_id: int
    pad_id: int
    tokenizer_sha256: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """The vocabulary of a tokenizer."""
        return cls(
            tokenizer.vocab_size,
            tokenizer.eos_token_id,
            tokenizer.mask_token_id,
            tokenizer.pad_token_id,
            tokenizer.sha256,
        )

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """The smallest type that holds every token."""
        return np.dtype("<u2" if self.size <= 1 << 16 else "<u4")


@dataclass
class BuildProgress:
    """What a build has done so far; handed to `on_progress`."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


OnProgress = Callable[[BuildProgress], None]


def write_corpus(
    batches: Iterable[Batch],
    vocabulary: Vocabulary,
    output_dir: str | Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    block_bytes: int = BLOCK_BYTES,
    source: dict[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Write tokenised documents as shards under a manifest.

    Written into `output_dir` + ".partial" and renamed when complete; an earlier build in `output_dir` is replaced.

    Raises:
        ValueError: `output_dir` holds something else, there is no document to write, or a token lies outside the
            vocabulary.
    """
    output_dir = Path(os.path.abspath(output_dir))
    partial = output_dir.with_name(output_dir.name + ".partial")
    for folder in (output_dir, partial):
        _check_own(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        writer = _CorpusWriter(partial, vocabulary, shard_tokens, block_bytes)
        progress, shards = _write_batches(batches, writer, partial / REJECTED_NAME, on_progress)
        if not shards:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(progress.rejected.items()))
            raise ValueError(
                f"{output_dir}: no document to write ({reasons or 'none found'}); check --input and --split"
            )
        _write_manifest(partial, vocabulary, progress, shards, source or {})
    except BaseException:
        shutil.rmtree(partial)
        raise
    _replace(partial, output_dir)
    return load_manifest(output_dir)


def _write_batches(
    batches: Iterable[Batch], writer: _CorpusWriter, rejected_path: Path, on_progress: OnProgress | None
) -> tuple[BuildProgress, list[Shard]]:
    progress = BuildProgress()
    with rejected_path.open("w", encoding="utf-8") as rejected:
        for batch in batches:
            for entry in batch:
                if isinstance(entry, Rejection):
                    progress.rejected[entry.reason] += 1
                    rejected.write(json.dumps({"name": entry.name, "reason": entry.reason}) + "\n")
                else:
                    writer.add(entry.tokens)
                    progress.documents += 1
                    progress.tokens += entry.tokens.size
                    progress.text_bytes += entry.text_bytes
            if on_progress is not None:
                on_progress(progress)
    return progress, writer.close()


def _write_manifest(
    folder: Path, vocabulary: Vocabulary, progress: BuildProgress, shards: list[Shard], source: dict[str, Any]
) -> None:
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "dtype": vocabulary.token_dtype.name,
        "vocab_size": vocabulary.size,
        "eos_id": vocabulary.eos_id,
        "mask_id": vocabulary.mask_id,
        "pad_id": vocabulary.pad_id,
        "tokenizer_sha256": vocabulary.tokenizer_sha256,
        "documents": progress.documents,
        "tokens": progress.tokens,
        "text_bytes": progress.text_bytes,
        "source": {**source, "rejected": dict(sorted(progress.rejected.items()))},
        "shards": [asdict(shard) for shard in shards],
    }
    content["sha256"] = content_hash(content)
    _write_synced(folder / MANIFEST_NAME, (json.dumps(content, indent=1) + "\n").encode())


def _check_own(folder: Path) -> None:
    """Refuse to touch anything that a build did not write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: exists and is not a folder; give another --output")
    foreign = sorted(entry.name for entry in folder.iterdir() if not OWN_FILES.fullmatch(entry.name))
    if foreign:
        raise ValueError(f"{folder}: holds files that are no shards ({foreign[0]}); give an empty or new --output")


def _replace(partial: Path, output_dir: Path) -> None:
    """Put the complete folder in place of an earlier one."""
    old = output_dir.with_name(output_dir.name + ".old")
    if output_dir.exists():
        _check_own(old)
        shutil.rmtree(old, ignore_errors=True)
        output_dir.rename(old)
    partial.rename(output_dir)
    shutil.rmtree(old, ignore_errors=True)


class _CorpusWriter:
    """Spreads documents over shards."""

    def __init__(self, folder: Path, vocabulary: Vocabulary, shard_tokens: int, block_bytes: int) -> None:
        self._folder, self._vocabulary = folder, vocabulary
        self._shard_tokens, self._block_bytes = shard_tokens, block_bytes
        self._shards: list[Shard] = []
        self._writer: _ShardWriter | None = None

    def add(self, tokens: Tokens) -> None:
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocabulary.size:
            raise ValueError(f"{self._folder}: a token lies outside the vocabulary of {self._vocabulary.size}")
        if self._writer is None:
            self._writer = _ShardWriter(self._folder, len(self._shards), self._block_bytes)
        self._writer.add(tokens.astype(self._vocabulary.token_dtype))
        if self._writer.tokens >= self._shard_tokens:
            self.close()

    def close(self) -> list[Shard]:
        """Finish the open shard; returns all that were written."""
        if self._writer is not None:
            self._shards.append(self._writer.close())
            self._writer = None
        return self._shards


class _ShardWriter:
    """Writes one shard and its index."""

    def __init__(self, folder: Path, number: int, block_bytes: int) -> None:
        self._path = folder / f"shard-{number:06d}.tar"
        self._file = self._path.open("w+b")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._number, self._block_bytes = number, block_bytes
        self._block: list[Tokens] = []
        self._held = self._blocks = 0
        self._index: list[tuple[int, int, int]] = []
        self.tokens = 0

    def add(self, tokens: Tokens) -> None:
        """Append a document."""
        self._block.append(tokens)
        self._held += tokens.nbytes
        self.tokens += tokens.size
        if self._held >= self._block_bytes:
            self._flush()

    def close(self) -> Shard:
        """Finish the tar, write the index, and describe both."""
        self._flush()
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        self._file.close()
        index = io.BytesIO()
        np.lib.format.write_array(index, np.array(self._index, dtype=INDEX_DTYPE), version=(1, 0), allow_pickle=False)
        index_path = self._path.with_suffix(".index.npy")
        _write_synced(index_path, index.getvalue())
        return Shard(
            name=self._path.name,
            documents=len(self._index),
            tokens=self.tokens,
            bytes=self._path.stat().st_size,
            sha256=sha256,
            index=index_path.name,
            index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
        )

    def _flush(self) -> None:
        if not self._block:
            return
        key = f"{self._number:06d}-{self._blocks:06d}"
        offset = self._tar.offset + tarfile.BLOCKSIZE
        for tokens in self._block:
            self._index.append((offset, tokens.size, zlib.crc32(tokens.data)))
            offset += tokens.nbytes
        self._add_member(f"{key}.tokens.bin", b"".join(tokens.tobytes() for tokens in self._block))
        lengths = np.array([tokens.size for tokens in self._block], dtype="<u4")
        self._add_member(f"{key}.lengths.bin", lengths.tobytes())
        self._block, self._held = [], 0
        self._blocks += 1

    def _add_member(self, name: str, data: bytes) -> None:
        # TarInfo's defaults (time 0, owner 0, mode 644) keep the bytes the same everywhere.
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

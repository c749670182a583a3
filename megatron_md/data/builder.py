"""Builder of shards: documents in, a folder of tar shards with a manifest out, byte for byte the same every time."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_md.data.corpus import Document, Rejection
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
BATCH_CHARACTERS = 1 << 18
ROUND_TRIP_STRIDE = 64
OWN_FILES = re.compile(r"shard-\d{6}\.(tar|index\.npy)|manifest\.json|rejected\.jsonl")

Tokens = npt.NDArray[np.unsignedinteger]
Corpus = Iterable[Document | Rejection]


@dataclass(frozen=True)
class Tokenised:
    """A document's tokens [n] in the shards' type, and the size of its text in UTF-8 bytes."""

    tokens: Tokens
    text_bytes: int


@dataclass
class BuildProgress:
    """What a build has done so far; handed to `on_progress`."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


def build_shards(
    corpus: Corpus,
    tokenizer: str | Path,
    output_dir: str | Path,
    *,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    block_bytes: int = BLOCK_BYTES,
    source: dict[str, Any] | None = None,
    on_progress: Callable[[BuildProgress], None] | None = None,
) -> Manifest:
    """Tokenise a corpus into shards.

    Written into `output_dir` + ".partial" and renamed when complete; an earlier build in `output_dir` is replaced.
    The bytes depend on the documents, the tokenizer and the sizes only. With `workers` > 1 the calling script needs
    the usual `if __name__ == "__main__"` guard.

    Args:
        corpus: documents in order; rejections among them are recorded. Empty documents are rejected.
        tokenizer: SentencePiece model file.
        output_dir: folder to create.
        workers: processes that tokenise; 1 does it in this process.
        shard_tokens: a shard is closed when it holds this many tokens.
        block_bytes: a tar member is closed when it holds this many bytes.
        source: free description, recorded in the manifest.
        on_progress: called after every batch of documents.

    Raises:
        ValueError: `output_dir` holds something else, no document can be written, or the tokenizer does not keep
            the text of one of the documents that are checked (every 64th).
    """
    loaded = Tokenizer(tokenizer)
    output_dir = Path(os.path.abspath(output_dir))
    partial = output_dir.with_name(output_dir.name + ".partial")
    for folder in (output_dir, partial):
        _check_own(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    progress = BuildProgress()
    shards = _write_shards(corpus, loaded, partial, workers, shard_tokens, block_bytes, progress, on_progress)
    if not shards:
        reasons = (
            ", ".join(f"{count} {reason}" for reason, count in sorted(progress.rejected.items())) or "there is none"
        )
        raise ValueError(f"{output_dir}: no document to write: {reasons}; check the input and the split")
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "dtype": _token_dtype(loaded.vocab_size).name,
        "vocab_size": loaded.vocab_size,
        "eos_id": loaded.eos_token_id,
        "mask_id": loaded.mask_token_id,
        "pad_id": loaded.pad_token_id,
        "tokenizer_sha256": loaded.sha256,
        "documents": progress.documents,
        "tokens": progress.tokens,
        "text_bytes": progress.text_bytes,
        "source": {**(source or {}), "rejected": dict(sorted(progress.rejected.items()))},
        "shards": [asdict(shard) for shard in shards],
    }
    content["sha256"] = content_hash(content)
    _write_synced(partial / MANIFEST_NAME, (json.dumps(content, indent=1) + "\n").encode())
    _replace(partial, output_dir)
    return load_manifest(output_dir)


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


def _write_shards(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    workers: int,
    shard_tokens: int,
    block_bytes: int,
    progress: BuildProgress,
    on_progress: Callable[[BuildProgress], None] | None,
) -> list[Shard]:
    shards: list[Shard] = []
    writer: _ShardWriter | None = None
    with (folder / REJECTED_NAME).open("w", encoding="utf-8") as rejected:
        for batch in _tokenise(corpus, tokenizer, workers):
            for result in batch:
                if isinstance(result, Rejection):
                    progress.rejected[result.reason] += 1
                    rejected.write(json.dumps({"name": result.name, "reason": result.reason}) + "\n")
                    continue
                writer = writer or _ShardWriter(folder, len(shards), block_bytes)
                writer.add(result.tokens)
                progress.documents += 1
                progress.tokens += result.tokens.size
                progress.text_bytes += result.text_bytes
                if writer.tokens >= shard_tokens:
                    shards.append(writer.close())
                    writer = None
            if on_progress is not None:
                on_progress(progress)
    if writer is not None:
        shards.append(writer.close())
    return shards


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


def _tokenise(corpus: Corpus, tokenizer: Tokenizer, workers: int) -> Iterator[list[Tokenised | Rejection]]:
    """Tokenised documents and rejections in the corpus' order, whatever the number of processes."""
    batches = _batches(corpus)
    if workers == 1:
        yield from (tokenise_batch(tokenizer, first, batch) for first, batch in batches)
        return
    # Spawned, not forked: the caller may hold threads (torch, progress bars) that a fork would break.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path,)) as pool:
        pending: deque[Future[list[Tokenised | Rejection]]] = deque()
        for first, batch in batches:
            pending.append(pool.submit(_work, first, batch))
            if len(pending) > 4 * workers:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())


def _result(future: Future[list[Tokenised | Rejection]]) -> list[Tokenised | Rejection]:
    try:
        return future.result()
    except ValueError as error:
        # The worker's traceback says nothing more than its one line.
        raise ValueError(str(error)) from None


def _batches(corpus: Corpus) -> Iterator[tuple[int, list[Document | Rejection]]]:
    """Documents in batches of some 256 K characters, each with the number of its first one."""
    batch: list[Document | Rejection] = []
    first = held = 0
    for entry in corpus:
        batch.append(entry)
        held += len(entry.text) if isinstance(entry, Document) else 0
        if held >= BATCH_CHARACTERS or len(batch) >= 4096:
            yield first, batch
            first, batch, held = first + len(batch), [], 0
    if batch:
        yield first, batch


def tokenise_batch(tokenizer: Tokenizer, first: int, batch: list[Document | Rejection]) -> list[Tokenised | Rejection]:
    """Tokenise a batch whose first document has number `first`; empty and unencodable ones become rejections."""
    dtype = _token_dtype(tokenizer.vocab_size)
    results: list[Tokenised | Rejection] = []
    for number, entry in enumerate(batch, start=first):
        if isinstance(entry, Rejection):
            results.append(entry)
        elif not entry.text:
            results.append(Rejection(entry.name, "empty"))
        else:
            try:
                text_bytes = len(entry.text.encode())
            except UnicodeEncodeError:
                results.append(Rejection(entry.name, "not encodable as UTF-8"))
                continue
            if number % ROUND_TRIP_STRIDE == 0:
                tokenizer.check_round_trip(entry)
            results.append(Tokenised(tokenizer.encode(entry.text).astype(dtype), text_bytes))
    return results


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Path) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer(tokenizer)


def _work(first: int, batch: list[Document | Rejection]) -> list[Tokenised | Rejection]:
    return tokenise_batch(_worker_tokenizer, first, batch)


def _token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

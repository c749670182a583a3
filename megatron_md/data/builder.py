"""Builder of shards: documents are tokenised by several processes; the bytes are the same for any number of them."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megatron_md.data.corpus import Document, Rejection
from megatron_md.data.shards import Manifest
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.data.writer import BLOCK_BYTES, SHARD_TOKENS, Batch, OnProgress, Tokenised, Vocabulary, write_corpus

BATCH_CHARACTERS = 1 << 18
ROUND_TRIP_STRIDE = 64

Corpus = Iterable[Document | Rejection]


def build_shards(
    corpus: Corpus,
    tokenizer: str | Path,
    output_dir: str | Path,
    *,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    block_bytes: int = BLOCK_BYTES,
    source: dict[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Tokenise a corpus into shards; see `write_corpus` for how they are written.

    The bytes depend on the documents, the tokenizer, the sizes and `source` only. With `workers` > 1 the calling
    script needs the usual `if __name__ == "__main__"` guard.

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
        ValueError: as `write_corpus`; also when the tokenizer does not keep the text of one of the documents that
            are checked (every 64th).
    """
    loaded = Tokenizer(tokenizer)
    return write_corpus(
        _tokenise(corpus, loaded, workers),
        Vocabulary.of(loaded),
        output_dir,
        shard_tokens=shard_tokens,
        block_bytes=block_bytes,
        source=source,
        on_progress=on_progress,
    )


def _tokenise(corpus: Corpus, tokenizer: Tokenizer, workers: int) -> Iterator[Batch]:
    """Tokenised documents and rejections in the corpus' order, whatever the number of processes."""
    batches = _batches(corpus)
    if workers == 1:
        yield from (tokenise_batch(tokenizer, first, batch) for first, batch in batches)
        return
    # Spawned, not forked: the caller may hold threads (torch, progress bars) that a fork would break.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path,)) as pool:
        pending: deque[Future[Batch]] = deque()
        for first, batch in batches:
            pending.append(pool.submit(_work, first, batch))
            if len(pending) > 4 * workers:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())


def _result(future: Future[Batch]) -> Batch:
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


def tokenise_batch(tokenizer: Tokenizer, first: int, batch: list[Document | Rejection]) -> Batch:
    """Tokenise a batch whose first document has number `first`; empty and unencodable ones become rejections."""
    results: Batch = []
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
            results.append(Tokenised(tokenizer.encode(entry.text).astype(np.uint32), text_bytes))
    return results


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Path) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to report, once
    _worker_tokenizer = Tokenizer(tokenizer)


def _work(first: int, batch: list[Document | Rejection]) -> Batch:
    return tokenise_batch(_worker_tokenizer, first, batch)

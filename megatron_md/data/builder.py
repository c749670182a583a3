"""Building of corpora: documents are tokenised by several processes; the bytes are the same for any number of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_md.data.corpus import EMBEDDED, Split, documents
from megatron_md.data.dialogues import ChatSettings, dialogues, tokenise_dialogue
from megatron_md.data.encoding import Encoding
from megatron_md.data.entries import Dialogue, Document, Entry, Record, Rejection, TokenDocument
from megatron_md.data.readers import DOCUMENT_BYTES, HUB, Reading
from megatron_md.data.resume import fingerprint, skip_done
from megatron_md.data.shards import Manifest
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.data.writer import (
    BLOCK_BYTES,
    SHARD_TOKENS,
    Batch,
    OnProgress,
    Tokenised,
    Vocabulary,
    interrupted_build,
    write_corpus,
)
from megatron_md.errors import UserError
from megatron_md.processes import die_with_parent

BATCH_CHARACTERS = 1 << 18
ROUND_TRIP_STRIDE = 64

Corpus = Iterable[Entry]


def build_corpus(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    split: Split = "all",
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    text_key: str = "text",
    max_document_bytes: int = DOCUMENT_BYTES,
    encoding: Encoding | None = None,
    skip_damaged: bool = False,
    chat: ChatSettings | None = None,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Tokenise files, folders and data sets into a folder of shards; what `megatron-md data build` does.

    Args:
        inputs: what to read, see `megatron_md.data.corpus.documents`.
        tokenizer: SentencePiece model or `tokenizer.json`.
        output: folder to create; an earlier build is replaced, an interrupted one of the same settings goes on.
        split: `train` or `valid` takes that part of the documents, by a hash of their names.
        workers: processes that tokenise, see `build_shards`.
        shard_tokens: tokens per shard.
        text_key: field of a JSON record, or column of a table, that holds the text.
        max_document_bytes: longer documents (for JSON lines: longer lines) are rejected.
        encoding: of text files and JSON; UTF-8 if None.
        skip_damaged: reject what cannot be read of a damaged file, instead of stopping.
        chat: read dialogues instead of texts, and mark their answers.
        on_progress: called after every batch of documents.

    Raises:
        UserError: a number is below 1, an input cannot be read, or as `build_shards`.
        InputError: a file is damaged.
    """
    for name, number in (
        ("workers", workers),
        ("shard-tokens", shard_tokens),
        ("max-document-bytes", max_document_bytes),
    ):
        if number < 1:
            raise UserError(f"--{name} {number}: must be at least 1")
    names = [
        str(path) if str(path) == EMBEDDED or str(path).startswith(HUB) else Path(path).resolve().name
        for path in inputs
    ]
    encoding = encoding or Encoding()
    reading = Reading(text_key, max_document_bytes, is_chat=chat is not None, encoding=encoding)
    corpus = documents(inputs, split, reading=reading, skip_damaged=skip_damaged)
    return build_shards(
        corpus if chat is None else dialogues(corpus, chat.turns),
        tokenizer,
        output,
        workers=workers,
        shard_tokens=shard_tokens,
        source={
            "inputs": names,
            "split": split,
            **({} if encoding == Encoding() else {"encoding": asdict(encoding)}),
            **({} if chat is None else {"chat": chat.record()}),
        },
        chat=chat,
        on_progress=on_progress,
    )


def build_shards(
    corpus: Corpus,
    tokenizer: str | Path,
    output_dir: str | Path,
    *,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    block_bytes: int = BLOCK_BYTES,
    source: dict[str, Any] | None = None,
    chat: ChatSettings | None = None,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Tokenise a corpus into shards; see `write_corpus` for how they are written.

    The bytes depend on the documents, the tokenizer, the sizes and `source` only. With `workers` > 1 the calling
    script needs the usual `if __name__ == "__main__"` guard. An interrupted build of the same settings goes on where
    its last complete shard ended: the corpus is read again up to there and checked, but not tokenised again.

    Args:
        corpus: documents in order; rejections among them are recorded. Empty documents are rejected.
        tokenizer: SentencePiece model or `tokenizer.json`.
        output_dir: folder to create.
        workers: processes that tokenise; 1 does it in this process.
        shard_tokens: a shard is closed when it holds this many tokens.
        block_bytes: a tar member is closed when it holds this many bytes.
        source: free description, recorded in the manifest.
        chat: how the dialogues of the corpus, if it is made of them, become documents.
        on_progress: called after every batch of documents.

    Raises:
        UserError: as `write_corpus` and `interrupted_build`; also when the corpus is not the one of the interrupted
            build, when the tokenizer does not keep the text of one of the documents that are checked (every 64th),
            or when documents that come as tokens do not fit it.
    """
    loaded = Tokenizer(tokenizer)
    vocabulary, entries = Vocabulary.of(loaded), iter(corpus)
    state = interrupted_build(vocabulary, output_dir, shard_tokens=shard_tokens, block_bytes=block_bytes, source=source)
    if state is not None:
        skip_done(entries, state, Path(f"{output_dir}.partial"))
    return write_corpus(
        _tokenise(entries, loaded, chat, workers, state.entries if state else 0),
        vocabulary,
        output_dir,
        shard_tokens=shard_tokens,
        block_bytes=block_bytes,
        source=source,
        on_progress=on_progress,
        resume_from=state,
    )


def _tokenise(
    corpus: Corpus, tokenizer: Tokenizer, chat: ChatSettings | None, workers: int, first: int
) -> Iterator[Batch]:
    """Tokenised documents and rejections in the corpus' order, whatever the number of processes."""
    batches = _batches(corpus, first)
    if workers == 1:
        yield from (tokenise_batch(tokenizer, first, batch, chat) for first, batch in batches)
        return
    # Spawned, not forked: the caller may hold threads (torch, progress bars) that a fork would break.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(), tokenizer.path, chat)) as pool:
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
        raise UserError(str(error)) from None


def _batches(corpus: Corpus, first: int) -> Iterator[tuple[int, list[Entry]]]:
    """Documents in batches of some 256 K characters, each with the number of its first one."""
    batch: list[Entry] = []
    held = 0
    for entry in corpus:
        batch.append(entry)
        held += _size(entry)
        if held >= BATCH_CHARACTERS or len(batch) >= 4096:
            yield first, batch
            first, batch, held = first + len(batch), [], 0
    if batch:
        yield first, batch


def _size(entry: Entry) -> int:
    if isinstance(entry, Document):
        return len(entry.text)
    if isinstance(entry, Dialogue):
        return sum(len(message.content) for message in entry.messages)
    return entry.tokens.nbytes if isinstance(entry, TokenDocument) else 0


def tokenise_batch(tokenizer: Tokenizer, first: int, batch: list[Entry], chat: ChatSettings | None = None) -> Batch:
    """Tokenise a batch whose first document has number `first`; empty and unencodable ones become rejections."""
    return [_tokenise_entry(tokenizer, number, entry, chat) for number, entry in enumerate(batch, start=first)]


def _tokenise_entry(
    tokenizer: Tokenizer, number: int, entry: Entry, chat: ChatSettings | None
) -> Tokenised | Rejection:
    checksum, is_sample = fingerprint(entry), number % ROUND_TRIP_STRIDE == 0
    if isinstance(entry, Rejection):
        return replace(entry, fingerprint=checksum)
    if isinstance(entry, Dialogue):
        assert chat is not None
        return tokenise_dialogue(tokenizer, chat, entry, checksum, check=is_sample)
    assert not isinstance(entry, Record)
    if isinstance(entry, TokenDocument):
        return _take_tokens(tokenizer, entry, checksum)
    if not entry.text:
        return Rejection(entry.name, "empty", fingerprint=checksum)
    try:
        text_bytes = len(entry.text.encode())
    except UnicodeEncodeError:
        return Rejection(entry.name, "not encodable as UTF-8", fingerprint=checksum)
    if is_sample:
        tokenizer.check_round_trip(entry)
    return Tokenised(tokenizer.encode(entry.text).astype(np.uint32), text_bytes, checksum)


def _take_tokens(tokenizer: Tokenizer, entry: TokenDocument, checksum: int) -> Tokenised | Rejection:
    """A document that was tokenised elsewhere, less the `<eos>` at its end: shards hold none."""
    tokens = entry.tokens
    if tokens.size and tokens[-1] == tokenizer.eos_token_id:
        tokens = tokens[:-1]
    if not tokens.size:
        return Rejection(entry.name, "empty", fingerprint=checksum)
    if int(tokens.min()) < 0 or int(tokens.max()) >= tokenizer.vocab_size:
        raise UserError(
            f"{entry.name}: holds token {int(tokens.max())}, but {tokenizer.path} has {tokenizer.vocab_size}; "
            "give the tokenizer that it was made with"
        )
    if (tokens == tokenizer.mask_token_id).any():
        return Rejection(entry.name, "holds the mask token", fingerprint=checksum)
    return Tokenised(tokens.astype(np.uint32), len(tokenizer.decode(tokens).encode()), checksum)


_worker: tuple[Tokenizer, ChatSettings | None]


def _start_worker(parent: int, tokenizer: Path, chat: ChatSettings | None) -> None:
    global _worker
    # Its queue would never tell that the parent is gone: each worker holds both ends of it.
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to report, once
    _worker = Tokenizer(tokenizer), chat


def _work(first: int, batch: list[Entry]) -> Batch:
    tokenizer, chat = _worker
    return tokenise_batch(tokenizer, first, batch, chat)

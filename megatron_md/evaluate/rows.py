"""The rows that a model is evaluated on: from a corpus of shards or from text files, cut as in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_md.batch import BoolArray, Int32Array, Int64Array, RightShift
from megatron_md.config import ChatConfig, Config
from megatron_md.data.chat_rows import validation_rows
from megatron_md.data.shards import MANIFEST_NAME, load_manifest
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.scoring import ScoredRows
from megatron_md.errors import UserError
from megatron_md.evaluate.detokenize import detokenize


@dataclass(frozen=True)
class TextFiles:
    """How text files are read.

    Attributes:
        detokenizer: name of what undoes the tokenisation that the files came with; they stay as they are if None.
        lines: each line that is not blank is a document, not each file.
        words: count the words of the files as they are, before any detokenisation.
    """

    detokenizer: str | None = None
    lines: bool = False
    words: bool = False


def evaluation_rows(
    data: Sequence[str],
    configs: Sequence[Config],
    tokenizer: Tokenizer,
    *,
    count: int,
    files: TextFiles | None = None,
) -> ScoredRows:
    """Rows of L tokens, L being the smallest `data.seq_length` of the runs.

    Args:
        data: one manifest (or its folder), whose first `count` rows of validation order are taken (of a chat corpus:
            dialogues, of which the answers are scored); or text files, of whose tokens, `<eos>` after each document,
            the first `count` rows are.
        configs: of the runs that are to score the same rows.
        tokenizer: theirs.
        count: most rows.
        files: how text files are read; as they are, each a document, by default.

    Raises:
        UserError: data that is not there, was made with another tokenizer, or has nothing to score; or words are to be
            counted where `count` cuts the text.
    """
    files = files or TextFiles()
    length = min(config.data.seq_length for config in configs)
    corpora = [path for path in data if _is_corpus(Path(path))]
    if corpora and len(data) > 1:
        raise UserError(f"{corpora[0]}: is a corpus; give it alone, or text files only")
    words, is_apart = None, False
    if corpora:
        if files != TextFiles():
            raise UserError(f"{corpora[0]}: is a corpus; --detokenizer, --lines and --words are for text files")
        manifest = load_manifest(data[0])
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(f"{data[0]}: was made with another tokenizer than the run's {tokenizer.path}")
        rows = validation_rows(manifest, _scored_with(configs), seq_length=length, count=count)
        is_apart = manifest.kind == "chat"
        tokens_RL, is_maskable_RL, cu_seqlens = rows.tokens_BL, rows.is_maskable_BL, rows.cu_seqlens
    else:
        texts = [_read_text(path) for path in data]
        words = sum(len(text.split()) for text in texts) if files.words else None
        documents = _documents(texts, files, tokenizer, None if files.words else count * length)
        if files.words and sum(map(len, documents)) > count * length:
            raise UserError(f"--words needs all of the text, which is longer than {count} rows: leave out --rows")
        tokens_RL, is_maskable_RL, cu_seqlens = _pack(documents, length, tokenizer, count)
    is_maskable_RL = RightShift(any(config.objective.right_shift for config in configs)).scorable(is_maskable_RL)
    scored = [row[is_scored] for row, is_scored in zip(tokens_RL, is_maskable_RL, strict=True)]
    size = sum(len(tokenizer.decode(row).encode()) for row in scored)
    return ScoredRows(tokens_RL, is_maskable_RL, size, cu_seqlens, words, is_apart)


def _scored_with(configs: Sequence[Config]) -> ChatConfig:
    """Whose `<eos>` counts: of several models', that of the one which has learnt the least about it."""
    return next((config.data.chat for config in configs if config.data.chat.padding == "ignore"), configs[0].data.chat)


def _is_corpus(path: Path) -> bool:
    return path.name == MANIFEST_NAME or path.suffix == ".json" or (path / MANIFEST_NAME).is_file()


def _read_text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); give a manifest or UTF-8 files") from None
    if not text.strip():
        raise UserError(f"{path}: is empty; there is nothing to score")
    return text


def _documents(texts: Sequence[str], files: TextFiles, tokenizer: Tokenizer, enough: int | None) -> list[Int64Array]:
    """Tokens of each document with an `<eos>` behind, until there are enough."""
    documents: list[Int64Array] = []
    total = 0
    for text in texts:
        for part in text.splitlines() if files.lines else [text]:
            if files.lines and not part.strip():
                continue
            plain = part if files.detokenizer is None else detokenize(part, files.detokenizer)
            documents.append(np.append(tokenizer.encode(plain), tokenizer.eos_token_id))
            total += len(documents[-1])
            if enough is not None and total >= enough:
                return documents
    return documents


def _pack(
    documents: Sequence[Int64Array], length: int, tokenizer: Tokenizer, count: int
) -> tuple[Int64Array, BoolArray, list[Int32Array]]:
    """At most `count` rows, which documents of [tokens] fill one after the other."""
    ends = np.cumsum([len(document) for document in documents])
    tokens = np.concatenate(documents)[: count * length]
    rows = -(-len(tokens) // length)
    tokens_RL = np.full(rows * length, tokenizer.pad_token_id, dtype=np.int64)
    tokens_RL[: len(tokens)] = tokens
    is_maskable_RL = np.arange(rows * length) < len(tokens)
    cu_seqlens = [
        np.unique([0, *(cut - start for cut in (*ends, len(tokens)) if start < cut < start + length), length])
        for start in range(0, rows * length, length)
    ]
    boundaries = [cuts.astype(np.int32) for cuts in cu_seqlens]
    return tokens_RL.reshape(rows, length), is_maskable_RL.reshape(rows, length), boundaries

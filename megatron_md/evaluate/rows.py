"""The rows that a model is evaluated on: from a corpus of shards or from text files, cut as in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_md.batch import BoolArray, Int32Array, Int64Array
from megatron_md.config import Config
from megatron_md.data.shards import MANIFEST_NAME, load_manifest
from megatron_md.data.stream import validation_rows
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.evaluate.nelbo import EvaluationRows


def evaluation_rows(
    data: Sequence[str], configs: Sequence[Config], tokenizer: Tokenizer, *, count: int
) -> EvaluationRows:
    """Rows of L tokens, L being the smallest `data.seq_length` of the runs.

    Args:
        data: one manifest (or its folder), whose first `count` rows of validation order are taken; or text files, of
            whose tokens, `<eos>` after each file, the first `count` rows are.
        configs: of the runs that are to score the same rows.
        tokenizer: theirs.
        count: most rows.

    Raises:
        ValueError: data that is not there, was made with another tokenizer, or has nothing to score.
    """
    length = min(config.data.seq_length for config in configs)
    corpora = [path for path in data if _is_corpus(Path(path))]
    if corpora and len(data) > 1:
        raise ValueError(f"{corpora[0]}: is a corpus; give it alone, or text files only")
    if corpora:
        manifest = load_manifest(data[0])
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            raise ValueError(f"{data[0]}: was made with another tokenizer than the run's {tokenizer.path}")
        rows = validation_rows(manifest, length, count)
        tokens_RL, is_maskable_RL, cu_seqlens = rows.tokens_BL, rows.is_maskable_BL, rows.cu_seqlens
    else:
        tokens_RL, is_maskable_RL, cu_seqlens = _rows_of_files(data, length, tokenizer, count)
    if any(config.objective.right_shift for config in configs):
        is_maskable_RL[:, 0] = False  # nothing lies to its left that could predict it
    scored = [row[is_scored] for row, is_scored in zip(tokens_RL, is_maskable_RL, strict=True)]
    size = sum(len(tokenizer.decode(row).encode()) for row in scored)
    return EvaluationRows(tokens_RL, is_maskable_RL, size, cu_seqlens)


def _is_corpus(path: Path) -> bool:
    return path.name == MANIFEST_NAME or path.suffix == ".json" or (path / MANIFEST_NAME).is_file()


def _rows_of_files(
    paths: Sequence[str], length: int, tokenizer: Tokenizer, count: int
) -> tuple[Int64Array, BoolArray, list[Int32Array]]:
    documents = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as text ({error}); give a manifest or UTF-8 files") from None
        documents.append(np.append(tokenizer.encode(text), tokenizer.eos_token_id))
        if sum(map(len, documents)) >= count * length:
            break
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

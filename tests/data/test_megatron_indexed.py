"""Megatron's .bin/.idx: documents as megatron-core wrote them; contradictions are named."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_md.data.builder import build_shards
from megatron_md.data.corpus import documents
from megatron_md.data.entries import Document, InputError, TokenDocument
from megatron_md.data.tokenizer import Tokenizer
from tests.data.small_corpus import all_documents, random_documents


def write_indexed(path: Path, documents: list[list[int]], dtype: type, sentences: int = 1) -> Path:
    """Write with megatron-core's own builder; each document as some sequences."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(path.with_suffix(".bin")), dtype=dtype)
    for document in documents:
        parts = np.array_split(np.array(document, dtype=np.int64), sentences)
        builder.add_document(torch.from_numpy(np.concatenate(parts)), [len(part) for part in parts])
    builder.finalize(str(path.with_suffix(".idx")))
    return path.with_suffix(".idx")


@pytest.mark.parametrize(("dtype", "sentences"), [(np.uint16, 1), (np.int32, 3), (np.int64, 2)])
def test_documents_of_megatron_core_come_back(tmp_path: Path, dtype: type, sentences: int) -> None:
    expected = random_documents(30)
    path = write_indexed(tmp_path / "x", expected, dtype, sentences)
    for given in (path, path.with_suffix(".bin"), tmp_path):
        found = list(documents([given]))
        assert all(isinstance(entry, TokenDocument) for entry in found)
        assert [entry.tokens.tolist() for entry in found if isinstance(entry, TokenDocument)] == expected
        assert [entry.name.partition("#")[2] for entry in found] == [str(n) for n in range(1, 31)]


def test_building_strips_eos_and_counts_text(tokenizer: Tokenizer, code: list[Document], tmp_path: Path) -> None:
    ids = [tokenizer.encode(document.text).tolist() for document in code[:9]]
    eos, mask = tokenizer.eos_token_id, tokenizer.mask_token_id
    source = write_indexed(tmp_path / "x", [*([*tokens, eos] for tokens in ids), [eos], [5, mask]], np.uint16)
    manifest = build_shards(documents([source]), tokenizer.path, tmp_path / "out")
    assert all_documents(manifest) == ids
    assert manifest.text_bytes == sum(len(document.text.encode()) for document in code[:9])
    assert manifest.source["rejected"] == {"empty": 1, "holds the mask token": 1}


def test_tokens_of_another_tokenizer_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_indexed(tmp_path / "x", [[5], [5, 330]], np.int32)
    with pytest.raises(ValueError, match=r"x\.idx#2: holds token 330, but .*small\.model has 330"):
        build_shards(documents([source]), tokenizer.path, tmp_path / "out")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"NOTMMIDX", "not an index of a Megatron data set"),
        (9, struct.pack("<Q", 2), "version 2 with token type 8"),
        (17, b"\x07", "token type 7"),
        (18, struct.pack("<Q", 1 << 60), "but its header asks for"),
        (34, struct.pack("<i", -1), r"a sequence lies outside .*x\.bin"),
        (34, struct.pack("<i", 1000), r"a sequence lies outside .*x\.bin"),
        (46, struct.pack("<q", -2), r"a sequence lies outside .*x\.bin"),
        (54, struct.pack("<q", 3), r"a sequence lies outside .*x\.bin"),
        (70, struct.pack("<q", 1), "document bounds do not run from 0 to 3"),
        (86, struct.pack("<q", 0), "document bounds do not run from 0 to 3"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    path = write_indexed(tmp_path / "x", [[5, 6], [7], [8]], np.uint16)
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        list(documents([path]))


def test_missing_half_and_cut_tokens_are_named(tmp_path: Path) -> None:
    path = write_indexed(tmp_path / "x", [[5, 6], [7]], np.uint16)
    path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:-2])
    with pytest.raises(InputError, match=r"its sequences take 6 bytes, .*x\.bin has 4"):
        list(documents([path]))
    path.with_suffix(".bin").unlink()
    with pytest.raises(InputError, match=r"x\.bin: no such file"):
        list(documents([path]))

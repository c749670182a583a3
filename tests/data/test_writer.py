"""Writing shards: types, edge cases, complete or not at all, nothing foreign touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_md.data.shards import load_manifest
from tests.data.small_corpus import WriteCorpus, all_documents, random_documents


def test_large_vocabulary_takes_four_bytes(write_tokens: WriteCorpus) -> None:
    documents = [[4, 70_000, 99_999], [65_535, 65_536], [5]]
    manifest = write_tokens(documents, vocab_size=100_000)
    assert manifest.dtype == "uint32" and all_documents(manifest) == documents
    assert write_tokens([[65_535]], vocab_size=65_536, name="small").dtype == "uint16"


def test_one_document_shards(write_tokens: WriteCorpus) -> None:
    documents = [tokens for tokens in random_documents(9) if tokens]
    manifest = write_tokens(documents, shard_tokens=1)
    assert [shard.documents for shard in manifest.shards] == [1] * len(documents)
    assert all_documents(manifest) == documents


def test_an_earlier_build_is_replaced_and_foreign_files_are_not(write_tokens: WriteCorpus, tmp_path: Path) -> None:
    write_tokens([[5]] * 20, shard_tokens=1)
    manifest = write_tokens([[6, 7]])
    assert all_documents(load_manifest(tmp_path / "corpus")) == [[6, 7]] == all_documents(manifest)
    (tmp_path / "corpus" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds files that are no shards \(thesis\.tex\)"):
        write_tokens([[8]])
    assert (tmp_path / "corpus" / "thesis.tex").read_text() == "years of work"


def test_nothing_to_write_is_refused_and_leaves_nothing(write_tokens: WriteCorpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no document to write \(none found\)"):
        write_tokens([])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_the_earlier_one(write_tokens: WriteCorpus, tmp_path: Path) -> None:
    write_tokens([[5]], vocab_size=10)
    with pytest.raises(ValueError, match=r"outside the vocabulary of 10"):
        write_tokens([[5, 10]], vocab_size=10)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert all_documents(load_manifest(tmp_path / "corpus")) == [[5]]

"""Corpora: what is read, what is rejected, how it is split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_md.data.corpus import documents, in_validation, texts
from megatron_md.data.entries import Document, Entry, Rejection


@pytest.fixture(scope="module")
def embedded() -> list[Entry]:
    return list(documents())


def test_embedded_corpus_is_large_ordered_and_without_tests(embedded: list[Entry]) -> None:
    entries = embedded
    names = [entry.name for entry in entries]
    assert names == sorted(set(names))
    assert "dataclasses.py" in names and "asyncio/events.py" in names
    assert not any("test" in name.split("/") or "tests" in name.split("/") for name in names)
    assert not any("site-packages" in name or "_sysconfigdata" in name for name in names)
    assert sum(len(document.text.encode()) for document in texts(entries)) >= 8_000_000


def test_splits_divide_the_corpus(embedded: list[Entry]) -> None:
    valid = [entry.name for entry in documents(split="valid")]
    assert valid == [entry.name for entry in embedded if in_validation(entry.name)]
    share = len(valid) / len(embedded)
    assert 0.02 < share < 0.09


def test_folder_is_read_in_order_and_line_ends_stay(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"two\r\nlines\n")
    (tmp_path / "a.md").write_bytes("é".encode())
    (tmp_path / "sub" / "latin.py").write_bytes("# coding: latin-1\nx = 'é'\n".encode("latin-1"))
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    assert list(documents([tmp_path])) == [
        Document("a.md", "é"),
        Document("b.txt", "two\r\nlines\n"),
        Document("sub/latin.py", "# coding: latin-1\nx = 'é'\n"),
    ]


def test_unreadable_documents_are_rejected_with_reasons(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "fine"}), "{broken", json.dumps({"body": 1}), "", json.dumps({"text": "also\nfine"})]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    (tmp_path / "y.txt").write_bytes(b"\xff\xfe\x00bad")
    assert list(documents([tmp_path / "x.jsonl", tmp_path / "y.txt"])) == [
        Document("x.jsonl#1", "fine"),
        Rejection("x.jsonl#2", "malformed JSON"),
        Rejection("x.jsonl#3", "no text field"),
        Document("x.jsonl#5", "also\nfine"),
        Rejection("y.txt", "not decodable", "byte 0 (0xff) is not UTF-8"),
    ]


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder"):
        list(documents([tmp_path / "nowhere"]))
    with pytest.raises(ValueError, match=r"no text file in this folder"):
        list(documents([tmp_path]))

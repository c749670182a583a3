"""Building shards: same bytes always, nothing lost, readable by stock webdataset."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from megatron_md.data.builder import build_corpus, build_shards
from megatron_md.data.entries import Document, Rejection
from megatron_md.data.survey import verify_corpus
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.errors import UserError
from tests.data.small_corpus import all_documents
from tests.test_processes import left_after, marked

SIZES = {"shard_tokens": 3000, "block_bytes": 2000}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_same_bytes_for_any_number_of_workers(
    tokenizer: Tokenizer, code: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build_shards(code, tokenizer.path, tmp_path / "one", workers=1, **SIZES)
    # Many batches, so that two workers do run side by side.
    monkeypatch.setattr("megatron_md.data.builder.BATCH_CHARACTERS", 2000)
    two = build_shards(code, tokenizer.path, tmp_path / "two", workers=2, **SIZES)
    assert len(one.shards) > 3 and one.sha256 == two.sha256
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_documents_come_back_and_totals_agree(tokenizer: Tokenizer, code: list[Document], tmp_path: Path) -> None:
    manifest = build_shards(code, tokenizer.path, tmp_path / "out", **SIZES)
    assert [tokenizer.decode(tokens) for tokens in all_documents(manifest)] == [document.text for document in code]
    assert manifest.documents == len(code)
    assert manifest.tokens == sum(len(tokens) for tokens in all_documents(manifest))
    assert manifest.text_bytes == sum(len(document.text.encode()) for document in code)
    assert (manifest.tokenizer_sha256, manifest.vocab_size) == (tokenizer.sha256, 330)
    assert verify_corpus(manifest) == []


def test_stock_webdataset_sees_the_same_documents(tokenizer: Tokenizer, code: list[Document], tmp_path: Path) -> None:
    manifest = build_shards(code, tokenizer.path, tmp_path / "out", **SIZES)
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    found = []
    for sample in samples:
        tokens = np.frombuffer(sample["tokens.bin"], dtype=manifest.token_dtype)
        ends = np.cumsum(np.frombuffer(sample["lengths.bin"], dtype="<u4"))
        assert ends[-1] == len(tokens)
        found += [part.tolist() for part in np.split(tokens, ends[:-1])]
    assert found == all_documents(manifest)
    assert len({sample["__key__"] for sample in samples}) == len(samples) > len(urls)


def test_documents_in_are_written_or_rejected(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = [
        Document("a", "x = 1"),
        Document("b", ""),
        Rejection("c", "not decodable"),
        Document("d", "\ud800"),
        Document("e", ""),
    ]
    manifest = build_shards(corpus, tokenizer.path, tmp_path / "out")
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["name"] for entry in rejected] == ["b", "c", "d", "e"]
    assert manifest.source["rejected"] == {"empty": 2, "not decodable": 1, "not encodable as UTF-8": 1}
    assert manifest.documents + len(rejected) == len(corpus)


def test_files_are_built_from_python(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"body": f"x = {n}"}) + "\n" for n in range(100)))
    train, valid = (
        build_corpus([tmp_path / "in"], tokenizer.path, tmp_path / split, split=split, text_key="body")
        for split in ("train", "valid")
    )
    assert train.documents + valid.documents == 100 and valid.documents < 20
    assert train.source == {"inputs": ["in"], "split": "train", "rejected": {}}
    for name in ("workers", "shard_tokens", "max_document_bytes"):
        with pytest.raises(UserError, match=rf"--{name.replace('_', '-')} 0: must be at least 1"):
            build_corpus([tmp_path / "in"], tokenizer.path, tmp_path / "out", **{name: 0})


ENDLESS_BUILD = """
import itertools, sys
from megatron_md.data.builder import build_shards
from megatron_md.data.entries import Document
if __name__ == "__main__":
    documents = (Document(str(number), "value = index + 1 " * 200) for number in itertools.count())
    build_shards(documents, sys.argv[1], sys.argv[2], workers=2)
"""


@pytest.mark.parametrize("is_working", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_build_leaves_no_process_and_no_semaphore(
    is_working: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    script, output = tmp_path / "build.py", tmp_path / "corpus"
    script.write_text(ENDLESS_BUILD)
    environment = {**os.environ, "TEST_MARKER": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, script, tokenizer.path, output], env=environment, stderr=subprocess.DEVNULL
    )
    written = Path(f"{output}.partial", "shard-000000.tar")
    deadline = time.monotonic() + 120
    # Two workers and multiprocessing's resource tracker.
    while len(marked(str(tmp_path))) < 4 or (is_working and not (written.is_file() and written.stat().st_size)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    semaphores = set(re.findall(r"/dev/shm/sem\.\S+", Path(f"/proc/{process.pid}/maps").read_text()))
    assert semaphores
    process.kill()
    process.wait()
    assert left_after(str(tmp_path)) == []
    assert [path for path in semaphores if os.path.exists(path)] == []

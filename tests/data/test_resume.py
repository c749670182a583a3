"""Resuming a build: the same bytes as without an interruption, wherever it comes; changed input is noticed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_md.data.builder import build_shards
from megatron_md.data.corpus import documents
from megatron_md.data.entries import Document, Entry, Rejection
from megatron_md.data.tokenizer import Tokenizer
from tests.data.small_corpus import made_up_code

SIZES = {"shard_tokens": 3000, "block_bytes": 2000}


@pytest.fixture
def corpus(code: list[Document]) -> list[Entry]:
    entries: list[Entry] = [*code[:20], Rejection("bad", "not decodable"), Document("empty", ""), *code[20:60]]
    return [*entries, Rejection("last", "not decodable")]


def interrupted(entries: list[Entry], at: int, error: type[BaseException] = KeyboardInterrupt) -> Iterator[Entry]:
    yield from entries[:at]
    raise error


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def build(corpus: object, tokenizer: Tokenizer, out: Path, **options: int) -> None:
    build_shards(corpus, tokenizer.path, out, **{**SIZES, **options})  # type: ignore[arg-type]


def test_any_interruption_ends_with_the_same_bytes(
    tokenizer: Tokenizer, corpus: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small batches, so that what came before the interruption is written when it comes.
    monkeypatch.setattr("megatron_md.data.builder.BATCH_CHARACTERS", 100)
    build(corpus, tokenizer, tmp_path / "whole")
    whole = folder_bytes(tmp_path / "whole")
    assert sum(name.endswith(".tar") for name in whole) > 5
    done = set()
    for at in (12, 21, 22, 23, 40, len(corpus)):
        with pytest.raises(KeyboardInterrupt):
            build(interrupted(corpus, at), tokenizer, tmp_path / "out")
        done.add(len(json.loads((tmp_path / "out.partial" / "progress.json").read_bytes())["shards"]))
        # The second interruption comes before anything new, the third time it goes through.
        with pytest.raises(KeyboardInterrupt):
            build(interrupted(corpus, at), tokenizer, tmp_path / "out")
        build(corpus, tokenizer, tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == whole
        assert not (tmp_path / "out.partial").exists()
    assert len(done) >= 4


def test_what_is_done_is_not_tokenised_again(
    tokenizer: Tokenizer, corpus: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_md.data.builder.BATCH_CHARACTERS", 100)
    with pytest.raises(KeyboardInterrupt):
        build(interrupted(corpus, 50), tokenizer, tmp_path / "out")
    entries = json.loads((tmp_path / "out.partial" / "progress.json").read_bytes())["entries"]
    encoded: list[str] = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: (encoded.append(text), encode(self, text))[1])
    monkeypatch.setattr(Tokenizer, "check_round_trip", lambda self, document: None)
    build(corpus, tokenizer, tmp_path / "out")
    assert encoded == [entry.text for entry in corpus[entries:] if isinstance(entry, Document) and entry.text]
    assert 40 < entries <= 50


def test_changed_input_and_settings_are_refused(
    tokenizer: Tokenizer, corpus: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_md.data.builder.BATCH_CHARACTERS", 100)
    with pytest.raises(KeyboardInterrupt):
        build(interrupted(corpus, 50), tokenizer, tmp_path / "out")
    before = folder_bytes(tmp_path / "out.partial")
    changed = [*corpus]
    changed[3] = Document(changed[3].name, "other")
    for bad in (changed, corpus[1:], corpus[:20]):
        with pytest.raises(ValueError, match=r"out\.partial: the input has changed since the build was interrupted"):
            build(bad, tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match=r"an interrupted build with other settings"):
        build(corpus, tokenizer, tmp_path / "out", shard_tokens=5000)
    kept = folder_bytes(tmp_path / "out.partial")
    assert all(kept[name] == before[name][: len(kept[name])] for name in kept)
    (tmp_path / "out.partial" / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar: missing or changed"):
        build(corpus, tokenizer, tmp_path / "out")
    (tmp_path / "out.partial" / "progress.json").write_text("{")
    with pytest.raises(ValueError, match=r"progress\.json: malformed JSON .*; delete .*out\.partial"):
        build(corpus, tokenizer, tmp_path / "out")


PROGRAM = """
import sys, time
from megatron_md.data.builder import build_shards
from megatron_md.data.corpus import documents
def slowly():
    for entry in documents([sys.argv[1]]):
        time.sleep(0.004)
        yield entry
if __name__ == "__main__":
    import megatron_md.data.builder as builder
    builder.BATCH_CHARACTERS = 2000
    build_shards(slowly(), sys.argv[2], sys.argv[3], workers=2, shard_tokens=3000, block_bytes=2000)
"""


def test_a_killed_build_goes_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = (json.dumps({"text": made_up_code(number)}) + "\n" for number in range(300))
    (tmp_path / "x.jsonl").write_text("".join(lines))
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [sys.executable, "program.py", str(tmp_path / "x.jsonl"), str(tokenizer.path), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, start_new_session=True)
    progress = tmp_path / "out.partial" / "progress.json"
    deadline = time.monotonic() + 120
    while not progress.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert 0 < json.loads(progress.read_bytes())["entries"] < 300
    for name in ("out", "whole"):
        build(documents([tmp_path / "x.jsonl"]), tokenizer, tmp_path / name)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")

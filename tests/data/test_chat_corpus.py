"""Corpora of dialogues: the same bytes for any workers and interruption; answers that every reader finds; damage."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from megatron_md.data.builder import build_corpus, build_shards
from megatron_md.data.cache import Cache
from megatron_md.data.chat_builtin import BUILT_IN
from megatron_md.data.chat_template import ChatTemplate
from megatron_md.data.dialogues import ChatSettings, Turns, dialogues
from megatron_md.data.entries import Entry, Record
from megatron_md.data.index import index_corpus
from megatron_md.data.shards import (
    DamagedDocumentError,
    Manifest,
    ShardError,
    ShardReader,
    content_hash,
    load_manifest,
)
from megatron_md.data.survey import token_counts, verify_corpus
from megatron_md.data.tokenizer import Tokenizer
from tests.data.file_server import file_server
from tests.data.small_corpus import all_documents, flip_byte
from tests.data.test_resume import folder_bytes, interrupted

SIZES = {"shard_tokens": 900, "block_bytes": 700}


def records(count: int = 60) -> list[Record]:
    """Dialogues of one and of two answers, every tenth of them without one."""
    made = []
    for number in range(count):
        messages = [
            {"role": "user", "content": f"def alpha_{number}({number})?"},
            {"role": "assistant", "content": f"index = {number}\nself.value" if number % 10 else ""},
        ]
        again = [{"role": "user", "content": "noise\n"}, {"role": "assistant", "content": f"clean {number}"}]
        made.append(Record(f"d#{number}", {"messages": messages + again * (number % 2)}))
    return made


def settings(tokenizer: Tokenizer, turns: Turns = "all") -> ChatSettings:
    return ChatSettings(ChatTemplate.of(tokenizer, "plain"), turns=turns, max_tokens=200, truncate="right")


def build(tokenizer: Tokenizer, output: Path, turns: Turns = "all", **options: Any) -> Manifest:
    chat = settings(tokenizer, turns)
    entries: Iterator[Entry] = options.pop("entries", None) or dialogues(records(), turns)
    return build_shards(entries, tokenizer.path, output, chat=chat, **{**SIZES, **options})


def all_answers(manifest: Manifest) -> list[list[list[int]]]:
    readers = [ShardReader(manifest, number) for number in range(len(manifest.shards))]
    return [reader.answers(number).tolist() for reader in readers for number in range(len(reader.index))]


def test_answers_come_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = build(tokenizer, tmp_path / "out")
    texts = [
        [tokenizer.decode(tokens[start:stop], show_special=True) for start, stop in runs]
        for tokens, runs in zip(all_documents(manifest), all_answers(manifest), strict=True)
    ]
    kept = [number for number in range(60) if number % 10]
    expected = [[f"index = {n}\nself.value<eos>", *[f"clean {n}<eos>"] * (n % 2)] for n in kept]
    assert texts == expected and len(manifest.shards) > 2
    assert manifest.kind == "chat" and manifest.source["rejected"] == {"empty answer": 6}
    assert manifest.answer_tokens == sum(stop - start for runs in all_answers(manifest) for start, stop in runs)
    assert verify_corpus(manifest) == []
    assert token_counts(manifest).sum() == manifest.tokens
    split = build(tokenizer, tmp_path / "split", turns="split")
    last = [[runs[-1]] for runs in expected if len(runs) > 1]
    assert split.documents == len(kept) + len(last)
    assert {len(runs) for runs in all_answers(split)} == {1}
    assert split.answer_tokens == manifest.answer_tokens


def test_stock_webdataset_finds_the_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = build(tokenizer, tmp_path / "out")
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    documents, answers = [], []
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        tokens = np.frombuffer(sample["tokens.bin"], dtype=manifest.token_dtype)
        ends = np.cumsum(np.frombuffer(sample["lengths.bin"], dtype="<u4"))
        triples = np.frombuffer(sample["answers.bin"], dtype="<u4").reshape(-1, 3)
        for number, document in enumerate(np.split(tokens, ends[:-1])):
            documents.append(document.tolist())
            answers.append(triples[triples[:, 0] == number, 1:].tolist())
    assert documents == all_documents(manifest) and answers == all_answers(manifest)


def test_the_same_bytes_for_any_workers_and_interruption(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_md.data.builder.BATCH_CHARACTERS", 200)
    build(tokenizer, tmp_path / "one", turns="split")
    build(tokenizer, tmp_path / "two", turns="split", workers=2)
    whole = folder_bytes(tmp_path / "one")
    assert folder_bytes(tmp_path / "two") == whole
    entries = list(dialogues(records(), "split"))
    for at in (45, 75):
        with pytest.raises(KeyboardInterrupt):
            build(tokenizer, tmp_path / "out", turns="split", entries=interrupted(entries, at))
        assert json.loads((tmp_path / "out.partial" / "progress.json").read_bytes())["progress"]["answer_tokens"] > 0
        with pytest.raises(ValueError, match="holds an interrupted build with other settings"):
            build_shards(iter(entries), tokenizer.path, tmp_path / "out", source={"other": 1}, **SIZES)
        changed = [entries[0], replace(entries[1], first_answer=0), *entries[2:]]  # type: ignore[type-var]
        with pytest.raises(ValueError, match="the input has changed"):
            build(tokenizer, tmp_path / "out", turns="split", entries=iter(changed))
        build(tokenizer, tmp_path / "out", turns="split", entries=iter(entries))
        assert folder_bytes(tmp_path / "out") == whole
        shutil.rmtree(tmp_path / "out")


def test_files_record_their_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lines = [json.dumps(record.fields) + "\n" for record in records(200)]
    (tmp_path / "in" / "a.jsonl").write_text("".join(lines))
    (tmp_path / "in" / "readme.txt").write_text("which holds no dialogue")
    chat = settings(tokenizer)
    parts = [
        build_corpus([tmp_path / "in"], tokenizer.path, tmp_path / split, split=split, chat=chat)
        for split in ("train", "valid")
    ]
    assert sum(part.documents for part in parts) == 180 and all(part.documents for part in parts)
    record = parts[0].source["chat"]
    assert ChatTemplate.recorded(record["template"]) == chat.template
    assert {key: record[key] for key in ("turns", "max_tokens", "truncate")} == {
        "turns": "all", "max_tokens": 200, "truncate": "right",
    }  # fmt: skip
    text = json.loads((tmp_path / "train" / "manifest.json").read_text())
    assert text["kind"] == "chat"


def test_a_manifest_does_not_know_where_things_lay(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folders = []
    for place in ("one", "two"):
        folder = tmp_path / place
        folder.mkdir()
        (folder / "in.jsonl").write_text(json.dumps(records()[1].fields))
        (folder / "own.jinja").write_text(BUILT_IN["plain"].source)
        chat = ChatSettings(ChatTemplate.of(tokenizer, str(folder / "own.jinja")))
        build_corpus([folder / "in.jsonl"], tokenizer.path, folder / "out", chat=chat)
        folders.append(folder_bytes(folder / "out"))
    assert folders[0] == folders[1]


def test_corpora_at_urls(tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = build(tokenizer, tmp_path / "out")
    with file_server(tmp_path) as server:
        far = load_manifest(f"{server.url}/out", cache=Cache(tmp_path / "cache"))
        assert all_answers(far) == all_answers(manifest) and verify_corpus(far) == []


def test_every_damaged_answer_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = build(tokenizer, tmp_path / "out")
    path = tmp_path / "out" / manifest.shards[0].name
    reader = ShardReader(manifest, 0)
    for number in (0, 4, len(reader.index) - 1):
        offset = int(reader.index["answers_offset"][number])
        for byte in (0, 5, 11):
            flip_byte(path, offset + byte)
            (problem,) = verify_corpus(manifest)
            assert f"{path}: the answers of document {number} (bytes {offset} to " in problem
            with pytest.raises(DamagedDocumentError, match="their crc32 differs"):
                ShardReader(manifest, 0).answers(number)
            flip_byte(path, offset + byte)
    assert verify_corpus(manifest) == []


@pytest.mark.parametrize(
    ("field", "document", "value"),
    [
        ("answer_runs", 0, 0),
        ("answer_runs", 0, 2**32 - 1),
        ("answer_runs", -1, 100),
        ("answers_offset", 0, 2**63),
        ("answers_offset", 3, 0),
        ("answers_offset", 0, 513),
        ("offset", 3, 0),
        ("tokens", 2, 1),
    ],
)
def test_a_hostile_index_is_refused(
    field: str, document: int, value: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    manifest = build(tokenizer, tmp_path / "out")
    path = tmp_path / "out" / manifest.shards[0].index
    index = np.load(path)
    index[field][document] = value
    forged = rewritten(manifest, path, index)
    with pytest.raises(ShardError, match=r"shard-000000\.index\.npy: does not match its hash, or is no index"):
        ShardReader(forged, 0)


def rewritten(manifest: Manifest, path: Path, index: np.ndarray[Any, Any]) -> Manifest:
    data = io.BytesIO()
    np.lib.format.write_array(data, index, version=(1, 0))
    path.write_bytes(data.getvalue())
    shard = replace(manifest.shards[0], index_sha256=hashlib.sha256(data.getvalue()).hexdigest())
    return replace(manifest, shards=(shard, *manifest.shards[1:]))


def test_hostile_answers_are_refused_though_their_checksum_fits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = build(tokenizer, tmp_path / "out")
    path = tmp_path / "out" / manifest.shards[0].name
    index = np.load(tmp_path / "out" / manifest.shards[0].index)
    # The second dialogue has a single answer.
    offset, tokens = int(index["answers_offset"][1]), int(index["tokens"][1])
    for run in ((1, 0, tokens + 1), (1, 3, 3), (1, 2**32 - 1, 1)):
        data = bytearray(path.read_bytes())
        data[offset : offset + 12] = np.array(run, "<u4").tobytes()
        path.write_bytes(data)
        index["answers_crc32"][1] = zlib.crc32(data[offset : offset + 12])
        forged = rewritten(manifest, tmp_path / "out" / manifest.shards[0].index, index)
        with pytest.raises(DamagedDocumentError, match=r"answers of document 1 .* they are no runs within it"):
            ShardReader(forged, 0).answers(1)


def test_a_manifest_of_another_kind_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    build(tokenizer, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    for changes, message in (
        ({"kind": "text"}, "answer_tokens is not a number of answers of text"),
        ({"answer_tokens": 0}, "answer_tokens is not a number of answers of chat"),
        ({"answer_tokens": content["tokens"] + 1}, "answer_tokens is not a number of answers of chat"),
        ({"kind": "video"}, "kind: Input should be 'text' or 'chat'"),
    ):
        edited = {**content, **changes}
        path.write_text(json.dumps({**edited, "sha256": content_hash(edited)}))
        with pytest.raises(ValueError, match=message):
            load_manifest(path)
    edited = {key: value for key, value in content.items() if key not in ("kind", "answer_tokens")}
    path.write_text(json.dumps({**edited, "sha256": content_hash(edited)}))
    with pytest.raises(ShardError, match="is no index"):
        ShardReader(load_manifest(path), 0)


def test_tars_made_elsewhere_are_indexed_with_their_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    manifest = build(tokenizer, tmp_path / "out")
    (tmp_path / "tars").mkdir()
    for shard in manifest.shards:
        shutil.copy(tmp_path / "out" / shard.name, tmp_path / "tars")
    found = index_corpus(tmp_path / "tars", tokenizer.path)
    assert found.shards == manifest.shards
    assert (found.kind, found.answer_tokens) == ("chat", manifest.answer_tokens)
    assert all_answers(found) == all_answers(manifest) and verify_corpus(found) == []


TOKENS, LENGTHS = np.array([5, 6, 7, 8], "<u2").tobytes(), np.array([3, 1], "<u4").tobytes()
SOUND = [(0, 1, 3), (1, 0, 1)]


@pytest.mark.parametrize(
    ("triples", "message"),
    [
        (SOUND, ""),
        (SOUND[:1], "no sound answers of its document 1"),
        ([(0, 1, 4), (1, 0, 1)], "no sound answers of its document 0"),
        ([(1, 0, 1), (0, 1, 3)], "no sound answers of its document"),
        ([*SOUND, (2, 0, 1)], "answers of documents that are not there"),
        (None, "do not both have .answers.bin; index them apart"),
    ],
)
def test_foreign_answers_are_checked(
    triples: list[tuple[int, int, int]] | None, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tars").mkdir()
    with webdataset.TarWriter(str(tmp_path / "tars" / "a.tar")) as writer:
        for key, runs in (("x", SOUND), ("y", triples)):
            members = {"tokens.bin": TOKENS, "lengths.bin": LENGTHS}
            if runs is not None:
                members["answers.bin"] = np.array(runs, "<u4").tobytes()
            writer.write({"__key__": key, **members})
    if not message:
        manifest = index_corpus(tmp_path / "tars", tokenizer.path)
        assert all_answers(manifest) == [[[1, 3]], [[0, 1]]] * 2 and manifest.answer_tokens == 6
        return
    with pytest.raises(ShardError, match=rf"a\.tar: member 'y\.tokens\.bin' at document 2: .*{message}"):
        index_corpus(tmp_path / "tars", tokenizer.path)

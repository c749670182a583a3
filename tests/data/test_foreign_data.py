"""Corpora and tokenizers that somebody else has written or damaged: one clear line or correct data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from megatron_md.data.entries import Document, Rejection, TokenDocument
from megatron_md.data.readers import Reading, read_file
from megatron_md.data.shards import content_hash, load_manifest
from megatron_md.data.survey import unigram_entropy, verify_corpus
from megatron_md.data.tokenizer import Tokenizer
from tests.data.small_corpus import WriteCorpus, all_documents, random_documents
from tests.data.test_megatron_indexed import write_indexed
from tests.data.test_readers import write_parquet
from tests.data.test_tokenizer_json import make
from tests.hostile import as_text, changed_bytes, changed_json, changed_value, fuzz, profiles, refused

TEXT = "def f(x):\n\treturn 'naïve – \U0001f600'  \u2581\n"


def rehashed(folder: Path, **files: bytes) -> None:
    """Write files of a corpus, and a manifest that vouches for them."""
    content = json.loads((folder / "manifest.json").read_bytes())
    for name, data in files.items():
        path = folder / content["shards"][0][name]
        path.write_bytes(data)
        content["shards"][0]["index_sha256" if name == "index" else "sha256"] = hashlib.sha256(data).hexdigest()
    content["sha256"] = content_hash(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def refused_or(read: Callable[[], Any]) -> Any:
    """What was read, or None where that was refused."""
    found: list[Any] = []
    return None if refused(lambda: found.append(read())) is not None else found[0]


def read_corpus(folder: Path, tokens: int) -> None:
    manifest = load_manifest(folder)
    lengths = [len(document) for document in all_documents(manifest)]
    assert sum(lengths) == manifest.tokens == tokens and verify_corpus(manifest) == []


@profiles
def test_a_manifest_edited_and_hashed_again(profile: str, write_tokens: WriteCorpus, tmp_path: Path) -> None:
    tokens = sum(map(len, random_documents(20)))
    write_tokens(random_documents(20), shard_tokens=200)
    folder = tmp_path / "corpus"
    sound = json.loads((folder / "manifest.json").read_bytes())

    def check(value: Any) -> None:
        if isinstance(value, dict):
            try:
                value = {**value, "sha256": content_hash(value)}
            except (ValueError, RecursionError):
                pass  # digits without end
        (folder / "manifest.json").write_bytes(value if isinstance(value, bytes) else as_text(value))
        refused(lambda: read_corpus(folder, tokens))
        refused(lambda: verify_corpus(load_manifest(folder, check_files=False)))
        refused(lambda: unigram_entropy(load_manifest(folder)))

    fuzz(st.one_of(changed_value(sound), changed_bytes(json.dumps(sound).encode())), check, profile)


@profiles
def test_an_index_changed_and_hashed_again(profile: str, write_tokens: WriteCorpus, tmp_path: Path) -> None:
    documents = [*random_documents(20), [5]]
    manifest = write_tokens(documents)
    path = tmp_path / "corpus" / manifest.shards[0].index

    def check(data: bytes) -> None:
        rehashed(tmp_path / "corpus", index=data)
        refused(lambda: read_corpus(tmp_path / "corpus", sum(map(len, documents))))
        refused(lambda: verify_corpus(load_manifest(tmp_path / "corpus")))

    fuzz(changed_bytes(path.read_bytes(), most=2), check, profile)


HEADER = "{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
DESCR = "[('offset', '<u8'), ('tokens', '<u4'), ('crc32', '<u4')]"


@pytest.mark.parametrize(
    "header",
    [
        "(" * 90,
        "{",
        "{}",
        "[]",
        "{'descr': x}",
        HEADER.format(descr="'|O'", order=False, shape=(2,)),
        HEADER.format(descr="[('x', '|O')]", order=False, shape=(2,)),
        HEADER.format(descr="'<q8'", order=False, shape=(2,)),
        HEADER.format(descr=DESCR, order=True, shape=(2,)),
        HEADER.format(descr=DESCR, order=False, shape=(1 << 62,)),
        HEADER.format(descr=DESCR, order=False, shape=(-2,)),
        HEADER.format(descr=DESCR, order=False, shape="(2, 1)"),
        HEADER.format(descr=DESCR, order=False, shape="((), 1)"),
        "{'descr': '<u8', 'fortran_order': False, 'shape': " + "9" * 5000 + "}",
    ],
)
def test_headers_of_an_index(header: str, write_tokens: WriteCorpus, tmp_path: Path) -> None:
    manifest = write_tokens([[5, 6, 7], [8, 9]])
    data = (tmp_path / "corpus" / manifest.shards[0].index).read_bytes()
    text = header.encode().ljust(117) + b"\n"
    rehashed(tmp_path / "corpus", index=b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data[-32:])
    said = refused(lambda: read_corpus(tmp_path / "corpus", 5))
    assert said is not None and "shard-000000.index.npy: does not match its hash, or is no index of the 2" in said


@pytest.mark.parametrize(
    ("field", "entry", "value"),
    [
        ("offset", 0, 2**64 - 2),
        ("offset", 1, 512),
        ("offset", 0, 1 << 40),
        ("offset", 0, 513),
        ("tokens", 0, 2**32 - 1),
    ],
)
def test_entries_of_an_index(field: str, entry: int, value: int, write_tokens: WriteCorpus, tmp_path: Path) -> None:
    manifest = write_tokens([[5, 6, 7], [8, 9]])
    data = (tmp_path / "corpus" / manifest.shards[0].index).read_bytes()
    index = np.frombuffer(data[-32:], [("offset", "<u8"), ("tokens", "<u4"), ("crc32", "<u4")]).copy()
    index[field][entry] = value
    rehashed(tmp_path / "corpus", index=data[:-32] + index.tobytes())
    said = refused(lambda: read_corpus(tmp_path / "corpus", 5))
    assert said is not None and "is no index of the 2 documents of shard-000000.tar" in said


@profiles
@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_megatrons_data_sets(suffix: str, profile: str, tmp_path: Path) -> None:
    documents = random_documents(6)
    path = write_indexed(tmp_path / "x", documents, np.int32).with_suffix(suffix)
    total = sum(map(len, documents))

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = refused_or(lambda: list(read_file("x", path, Reading())))
        if found is not None:
            assert all(isinstance(entry, TokenDocument) for entry in found)
            assert sum(len(entry.tokens) for entry in found) == path.with_suffix(".bin").stat().st_size // 4 == total

    fuzz(changed_bytes(path.read_bytes(), most=2), check, profile)


def test_a_bin_of_another_size_than_its_index_says(tmp_path: Path) -> None:
    path = write_indexed(tmp_path / "x", [[5, 6], [7]], np.uint16)
    sound = path.with_suffix(".bin").read_bytes()
    for data in (sound + b"x", sound + b"xy", sound[:-1], b""):
        path.with_suffix(".bin").write_bytes(data)
        said = refused(lambda: list(read_file("x", path, Reading())))
        assert said is not None and f"its sequences take 6 bytes, {path.with_suffix('.bin')} has {len(data)}" in said


@profiles
def test_parquet_files(profile: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path, rows = tmp_path / "x.parquet", [f"row {n}" for n in range(30)]
    write_parquet(path, pyarrow.array(rows), row_group_size=10, write_page_checksum=True, compression="none")

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = refused_or(lambda: list(read_file("x", path, Reading())))
        assert found is None or all(isinstance(entry, (Document, Rejection)) for entry in found)

    fuzz(changed_bytes(path.read_bytes(), most=2), check, profile)


def test_parquet_columns_of_other_types(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    columns = {
        "decimal": pyarrow.array([None, 1], pyarrow.decimal256(60, 2)),
        "time": pyarrow.array([2**62, -(2**62)], pyarrow.timestamp("us")),
        "list": pyarrow.array([["x"], []]),
        "struct": pyarrow.array([{"text": "x"}, None]),
        "bytes": pyarrow.array([b"\xff", b"x"]),
        "codes": pyarrow.array(["x", "y"]).dictionary_encode(),
        "large": pyarrow.array(["x", "y"], pyarrow.large_string()),
    }
    for name, column in columns.items():
        write_parquet(tmp_path / "x.parquet", column)
        found = refused_or(lambda: list(read_file("x", tmp_path / "x.parquet", Reading())))
        assert found == ([Document("x#1", "x"), Document("x#2", "y")] if name in ("codes", "large") else None)


@profiles
def test_lines_of_json(profile: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        for entry in list(read_file("x", path, Reading())):
            assert isinstance(entry, Rejection) or isinstance(entry.text, str)

    fuzz(changed_json({"text": "x", "id": [1]}), check, profile)


def use(path: Path) -> None:
    tokenizer = Tokenizer(path)
    ids = list(range(tokenizer.vocab_size))[:2000]
    assert isinstance(tokenizer.decode(ids, show_special=True), str)
    encoded = tokenizer.encode(TEXT)
    assert all(0 <= id < tokenizer.vocab_size for id in encoded.tolist())
    tokenizer.decode(encoded).encode()


@profiles
def test_sentencepiece_models(profile: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.model"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        refused(lambda: use(path))

    # Most added or lost bytes are noticed by protobuf: changed ones get further.
    flips = st.lists(st.tuples(st.integers(0, len(tokenizer.path.read_bytes()) - 1), st.integers(1, 255)), min_size=1)
    flipped = flips.map(lambda places: _flipped(tokenizer.path.read_bytes(), places))
    fuzz(st.one_of(flipped, changed_bytes(tokenizer.path.read_bytes())), check, profile)


def _flipped(sound: bytes, places: list[tuple[int, int]]) -> bytes:
    data = bytearray(sound)
    for at, bits in places[:4]:
        data[at] ^= bits
    return bytes(data)


def test_a_sentencepiece_model_whose_pieces_are_not_utf8(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = tokenizer.decode(
        [max(range(tokenizer.vocab_size), key=lambda id: len(tokenizer.decode([id]).strip()))]
    ).strip()
    data = tokenizer.path.read_bytes()
    assert text.isascii() and len(text) > 3 and text.encode() in data
    (tmp_path / "x.model").write_bytes(data.replace(text.encode(), b"\xff" * len(text)))
    said = refused(lambda: use(tmp_path / "x.model"))
    assert said is not None and "x.model: not a SentencePiece model, or one whose pieces are not UTF-8" in said


@profiles
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_json(name: str, profile: str, code: list[Document], tmp_path: Path) -> None:
    path = make(tmp_path / "hf", code, config={"eos_token": "<|endoftext|>", "pad_token": {"content": "<|endoftext|>"}})
    sound = json.loads((path / name).read_bytes())
    if name == "tokenizer.json":
        # A few of its many pieces are as good as all, and are changed more often.
        sound["model"]["merges"] = sound["model"]["merges"][:3]

    def check(data: bytes) -> None:
        (path / name).write_bytes(data)
        refused(lambda: use(path))

    (path / name).write_text(json.dumps(sound))
    use(path)
    fuzz(changed_json(sound), check, profile)
    outer = {key: value for key, value in sound.items() if key != "model"}
    fuzz(changed_value(outer).map(lambda value: _with_model(value, sound)), check, profile)


def _with_model(value: Any, sound: Any) -> bytes:
    return as_text({**value, "model": sound["model"]} if isinstance(value, dict) and "model" in sound else value)

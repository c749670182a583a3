"""Readers: every kind of input gives its documents; damage and abuse are named."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_md.data.corpus import documents
from megatron_md.data.entries import Document, Entry, InputError, Record, Rejection
from megatron_md.data.readers import Reading

TEXTS = ["fine", "also\nfine – ü", "x = 1\n\tindented"]


def json_lines(texts: list[str] = TEXTS) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstd(data: bytes) -> bytes:
    # As a stream: like most files in the wild it does not say how large its content is.
    compressor = pytest.importorskip("zstandard").ZstdCompressor().compressobj()
    return compressor.compress(data) + compressor.flush()


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5  # webdataset's writer does this: pax headers for the fraction
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path, **options: Any) -> list[Entry]:
    return list(documents([path], **options))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_and_text_whatever_the_compression(tmp_path: Path, suffix: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(b"\xef\xbb\xbf" + json_lines()))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(b"one\r\ndocument"))
    found = read(tmp_path)
    assert found == [
        *(Document(f"a.jsonl{suffix}#{number}", text) for number, text in enumerate(TEXTS, start=1)),
        Document(f"b.txt{suffix}", "one\r\ndocument"),
    ]


def test_other_keys_and_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [b'{"body": "yes"}', b'{"text": "no"}', b'{"body": "\xff"}', b"[" * 100_000, b'{"body": 3}', b""]
    path.write_bytes(b"\n".join([*lines, b'{"body": "last"}']))
    assert read(path, reading=Reading(text_key="body")) == [
        Document("x.jsonl#1", "yes"),
        Rejection("x.jsonl#2", "no text field"),
        Rejection("x.jsonl#3", "not decodable", "byte 10 (0xff) is not UTF-8"),
        Rejection("x.jsonl#4", "malformed JSON"),
        Rejection("x.jsonl#5", "no text field"),
        Document("x.jsonl#7", "last"),
    ]


def test_long_documents_are_rejected_and_the_next_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(json_lines(["a" * 50, "b" * 5000, "c" * 50]))
    (tmp_path / "y.txt").write_bytes(b"d" * 101)
    (tmp_path / "z.txt").write_bytes(b"d" * 100)
    assert read(tmp_path, reading=Reading(document_bytes=100)) == [
        Document("x.jsonl#1", "a" * 50),
        Rejection("x.jsonl#2", "too long"),
        Document("x.jsonl#3", "c" * 50),
        Rejection("y.txt", "too long"),
        Document("z.txt", "d" * 100),
    ]


def test_a_python_file_may_name_any_codec(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_bytes(b"# coding: rot13\nx = 1\n")
    assert read(tmp_path / "x.py") == [Rejection("x.py", "not decodable", "cannot be read as rot13")]


def write_parquet(path: Path, column: Any, **options: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"id": pyarrow.array(range(len(column))), "text": column}), path, **options)


def test_parquet_rows_come_in_order(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    values: list[str | None] = [f"row {n}\n" for n in range(300)]
    values[7] = None
    write_parquet(tmp_path / "x.parquet", pyarrow.array(values, pyarrow.string()), row_group_size=100)
    found = read(tmp_path / "x.parquet")
    assert len(found) == 300 and found[7] == Rejection("x.parquet#8", "no text field")
    assert [entry.text for entry in found if isinstance(entry, Document)] == [v for v in values if v is not None]
    with pytest.raises(ValueError, match=r"x\.parquet: no column 'body'; it has id, text: say --text-key"):
        read(tmp_path / "x.parquet", reading=Reading(text_key="body"))


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    write_parquet(
        path, pyarrow.array([f"row {n} " * 20 for n in range(300)]), row_group_size=100, write_page_checksum=True
    )
    import pyarrow.parquet as parquet

    begin = parquet.ParquetFile(path).metadata.row_group(1).column(1).dictionary_page_offset
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-9])
    with pytest.raises(InputError, match=r"x\.parquet: not a readable Parquet file"):
        read(path)
    data[begin + 80 : begin + 120] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.parquet: row group 1 is damaged after row 100"):
        read(path)


def test_text_tars_of_stock_webdataset(tmp_path: Path) -> None:
    import webdataset

    path = tmp_path / "made.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number, text in enumerate(TEXTS):
            writer.write({"__key__": f"s{number}", "txt": text, "json": {"text": text.upper()}, "cls": number})
    found = read(path)
    assert [entry.text for entry in found if isinstance(entry, Document)] == [
        version for text in TEXTS for version in (text.upper(), text)
    ]
    assert [entry for entry in found if isinstance(entry, Rejection)] == [
        Rejection(f"made.tar/s{n}.cls", "not text", "cls") for n in range(3)
    ]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
def test_long_names_lines_and_compression_in_tars(tmp_path: Path, suffix: str) -> None:
    long_name = "deep/" * 40 + "ü.txt"
    plain = write_tar(tmp_path / "plain", [(long_name, b"long"), ("lines.jsonl", json_lines())], tarfile.GNU_FORMAT)
    pack = gzip.compress if suffix.endswith("gz") else zstd if suffix.endswith("zst") else bytes
    path = tmp_path / f"x{suffix}"
    path.write_bytes(pack(plain.read_bytes()))
    assert [(entry.name, getattr(entry, "text", None)) for entry in read(path)] == [
        (f"x{suffix}/{long_name}", "long"),
        *((f"x{suffix}/lines.jsonl#{n}", text) for n, text in enumerate(TEXTS, start=1)),
    ]


class Bait:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.path, "executed")


def test_abuse_is_rejected_and_nothing_is_executed(tmp_path: Path) -> None:
    bait = pickle.dumps(Bait(tmp_path / "executed"))
    path = tmp_path / "x.tar"
    names = ["../up.txt", "/etc/x.txt", "a/../../b.txt", "a\\b.txt", "a.pyd", "b.pickle", "c.pkl", "fine.txt"]
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(bait)
            tar.addfile(info, io.BytesIO(bait if not name.endswith("fine.txt") else b"f" * len(bait)))
        for name, type in (("l.txt", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE), ("d.txt", tarfile.CHRTYPE),
                           ("p.txt", tarfile.FIFOTYPE), ("folder", tarfile.DIRTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type, "/etc/passwd"
            tar.addfile(info)
    found = read(path)
    assert [entry for entry in found if isinstance(entry, Document)] == [Document("x.tar/fine.txt", "f" * len(bait))]
    reasons = {entry.name.removeprefix("x.tar/"): entry.reason for entry in found if isinstance(entry, Rejection)}
    assert reasons == {
        **dict.fromkeys(names[:4], "unsafe name"),
        **dict.fromkeys(names[4:7], "not text"),
        **dict.fromkeys(["l.txt", "h.txt", "d.txt", "p.txt"], "not a regular file"),
    }
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]


def test_tables_and_hub_name_the_package_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("pyarrow", "pyarrow.parquet", "zstandard", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "x.parquet").write_bytes(b"")
    (tmp_path / "x.jsonl.zst").write_bytes(b"")
    for source in (tmp_path / "x.parquet", tmp_path / "x.jsonl.zst", "datasets:org/name"):
        with pytest.raises(ValueError, match=r"needs (pyarrow|zstandard|datasets): pip install 'megatron-md"):
            list(documents([source]))


def test_hub_data_sets_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "train.jsonl").write_bytes(json_lines())
    source = f"datasets:{tmp_path / 'local'}"
    assert [entry.text for entry in documents([source]) if isinstance(entry, Document)] == TEXTS
    with pytest.raises(ValueError, match=r"local::test: cannot be loaded: .*test"):
        list(documents([f"{source}::test"]))
    with pytest.raises(ValueError, match=r"no column 'body' among text: say --text-key"):
        list(documents([source], reading=Reading(text_key="body")))


TURNS = [{"role": "user", "content": "naïve"}, {"role": "assistant", "content": "yes"}]
RECORDS = [{"messages": TURNS}, {"messages": TURNS[:1]}, {"messages": None}]


def chat(path: Path | str) -> list[Entry]:
    return list(documents([path], reading=Reading(is_chat=True)))


def test_records_of_dialogues_come_whole(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({**record, "id": 3}).encode() + b"\n" for record in RECORDS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines + b"{\n3\n\xff\n"))
    write_tar(tmp_path / "b.tar", [("x.jsonl", lines), ("y.json", lines.splitlines()[0]), ("z.txt", b"text")])
    (tmp_path / "readme.md").write_text("no dialogue")
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    table = pyarrow.Table.from_pylist([{"id": number, **record} for number, record in enumerate(RECORDS * 50)])
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=40)
    whole = [{**record, "id": 3} for record in RECORDS]
    assert chat(tmp_path) == [
        *(Record(f"a.jsonl.gz#{number}", fields) for number, fields in enumerate(whole, start=1)),
        Rejection("a.jsonl.gz#4", "malformed JSON"),
        Rejection("a.jsonl.gz#5", "not a JSON object"),
        Rejection("a.jsonl.gz#6", "not decodable", "byte 0 (0xff) is not UTF-8"),
        *(Record(f"b.tar/x.jsonl#{number}", fields) for number, fields in enumerate(whole, start=1)),
        Record("b.tar/y.json", whole[0]),
        Rejection("b.tar/z.txt", "not text", "txt"),
        # Of a table only what is needed is read.
        *(Record(f"c.parquet#{number}", fields) for number, fields in enumerate(RECORDS * 50, start=1)),
    ]


def test_columns_of_dialogues(tmp_path: Path) -> None:
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    pairs = [{"completion": "yes", "prompt": "naïve", "score": 0.5}]
    parquet.write_table(pyarrow.Table.from_pylist(pairs), tmp_path / "a.parquet")
    assert chat(tmp_path / "a.parquet") == [Record("a.parquet#1", {"prompt": "naïve", "completion": "yes"})]
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "x", "answer": "y"}]), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a\.parquet: no dialogues: its columns are prompt, answer, known are messages"
    ):
        chat(tmp_path / "a.parquet")
    # Bytes that are no UTF-8 within a nested column.
    bad = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    nested = pyarrow.StructArray.from_arrays([pyarrow.array(["user", "user"]), bad], names=["role", "content"])
    column = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2]), nested)
    parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "a.parquet")
    assert chat(tmp_path / "a.parquet") == [
        Record("a.parquet#1", {"messages": [{"role": "user", "content": "ok"}]}),
        Rejection("a.parquet#2", "not decodable"),
    ]


def test_hub_data_sets_of_dialogues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "local").mkdir()
    lines = [json.dumps({"id": 1, "messages": TURNS}), json.dumps({"id": 2, "messages": TURNS[:1]})]
    (tmp_path / "local" / "train.jsonl").write_text("\n".join(lines))
    source = f"datasets:{tmp_path / 'local'}"
    assert [entry.fields for entry in chat(source) if isinstance(entry, Record)] == RECORDS[:2]
    (tmp_path / "local" / "train.jsonl").write_text(json.dumps({"text": "x"}))
    with pytest.raises(ValueError, match=r"local: no dialogues: its columns are text, known are messages"):
        chat(source)

"""Text in other encodings: refused with the byte and the way out, or read as asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_md.cli import main
from megatron_md.data.corpus import documents
from megatron_md.data.encoding import Encoding, NotDecodableError
from megatron_md.data.entries import Document, Entry
from megatron_md.data.readers import Reading
from megatron_md.data.shards import ShardReader, load_manifest
from megatron_md.data.tokenizer import Tokenizer
from tests.data.small_corpus import made_up_code
from tests.data.test_readers import write_tar

TEXT = "Ein Café für Ägypten"


@pytest.fixture
def latin(tmp_path: Path) -> Path:
    """A folder of latin-1 files, of each kind of text."""
    folder = tmp_path / "latin"
    folder.mkdir()
    line = json.dumps({"text": TEXT}, ensure_ascii=False)
    (folder / "a.txt").write_text(TEXT, "latin-1")
    (folder / "b.jsonl").write_text(f"{line}\n{line}\n", "latin-1")
    (folder / "c.py").write_text(f"# {TEXT}\n", "latin-1")
    write_tar(folder / "d.tar", [("x.txt", TEXT.encode("latin-1")), ("y.json", line.encode("latin-1"))])
    return folder


def read(path: Path, name: str | None = None, errors: str = "strict") -> list[Entry]:
    return list(documents([path], reading=Reading(encoding=Encoding(name, errors))))  # type: ignore[arg-type]


def test_every_kind_of_file_is_read_as_asked(latin: Path) -> None:
    found = read(latin, "latin-1")
    assert found == [
        Document("a.txt", TEXT),
        Document("b.jsonl#1", TEXT),
        Document("b.jsonl#2", TEXT),
        Document("c.py", f"# {TEXT}\n"),
        Document("d.tar/x.txt", TEXT),
        Document("d.tar/y.json", TEXT),
    ]
    assert len(read(latin, errors="replace")) == len(read(latin, errors="ignore")) == len(found)
    assert read(latin / "a.txt", errors="replace") == [Document("a.txt", "Ein Caf\ufffd f\ufffdr \ufffdgypten")]
    assert read(latin / "a.txt", errors="ignore") == [Document("a.txt", "Ein Caf fr gypten")]


@pytest.mark.parametrize(
    ("data", "is_python", "message"),
    [
        (TEXT.encode("latin-1"), False, "byte 7 (0xe9) is not UTF-8"),
        (b"\xef\xbb\xbfabc\xff", False, "byte 6 (0xff) is not UTF-8"),
        (b"x = 1\n" * 9 + b"\xe9", True, "byte 54 (0xe9) is not UTF-8"),
        (b"# \xe9\n", True, "byte 2 (0xe9) is not UTF-8"),
        (b"# coding: ascii\n\xe9", True, "byte 16 (0xe9) is not ascii"),
        (b"# coding: klingon\n", True, "its first lines declare an encoding that Python does not know"),
    ],
)
def test_the_byte_is_named(data: bytes, is_python: bool, message: str) -> None:
    with pytest.raises(NotDecodableError) as error:
        Encoding().decode(data, is_python=is_python)
    assert str(error.value) == message
    assert Encoding(errors="replace").decode(data, is_python=is_python)


def test_a_declaration_holds_unless_an_encoding_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_bytes(b"# coding: latin-1\n'\xa4'\n")
    assert read(tmp_path / "x.py") == [Document("x.py", "# coding: latin-1\n'¤'\n")]
    assert read(tmp_path / "x.py", "iso-8859-15") == [Document("x.py", "# coding: latin-1\n'€'\n")]


def test_wide_encodings_are_of_texts_not_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, "utf-16")
    assert read(tmp_path, "utf-16") == [Document("a.txt", TEXT)]
    (tmp_path / "b.jsonl").write_text("{}", "utf-16")
    with pytest.raises(ValueError, match=r"^b\.jsonl: JSON lines in utf-16 cannot be read; convert the file to UTF-8$"):
        read(tmp_path, "utf-16")


@pytest.mark.parametrize("name", ["klingon", "rot13", "hex"])
def test_what_is_no_encoding_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^--encoding {name}: no encoding that Python knows; give one like latin-1"):
        Encoding(name)


def test_commands_name_file_byte_and_way_out(
    latin: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = f"megatron-md: {latin}/a.txt: byte 7 (0xe9) is not UTF-8, so that it is left out; say --encoding NAME"
    left_out = "megatron-md: 6 documents are left out that are not in the encoding\n"
    model, out = str(tmp_path / "t.model"), tmp_path / "out"
    train = ["tokenizer", "train", "--input", str(latin), "--vocab", "330", "--output", model]
    build = ["data", "build", "--input", str(latin), "--tokenizer", str(tokenizer.path), "--output", str(out)]
    for command, verdict in ((train, "no text to train a tokenizer on"), (build, "no document to write")):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert told in said and left_out in said and verdict in said
        assert main([*command, "--encoding", "klingon"]) == 2
        assert capsys.readouterr().err.startswith("megatron-md: --encoding klingon: no encoding that Python knows")
    (latin / "code.txt").write_text("".join(map(made_up_code, range(40))))
    for command in (train, build):
        assert main([*command, "--encoding", "latin-1"]) == 0
        assert capsys.readouterr().err == ""
    manifest = load_manifest(out)
    assert manifest.source["encoding"] == {"name": "latin-1", "errors": "strict"}
    assert tokenizer.decode(ShardReader(manifest, 0).document(0)) == TEXT
    assert main(build) == 0
    assert load_manifest(out).documents == 1 and "encoding" not in load_manifest(out).source
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert rejected[0]["detail"] == "byte 7 (0xe9) is not UTF-8"

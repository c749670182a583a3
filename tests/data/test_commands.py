"""The commands: from text to verified shards through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_md.cli import main
from megatron_md.data.corpus import Document
from megatron_md.data.shards import load_manifest
from megatron_md.data.tokenizer import Tokenizer


@pytest.fixture
def text_folder(tmp_path: Path, code: list[Document]) -> Path:
    for document in code:
        path = tmp_path / "text" / document.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text)
    return tmp_path / "text"


def test_text_to_shards(text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tmp_path / "t.model", tmp_path / "out"
    assert main(["tokenizer", "train", "--input", str(text_folder), "--vocab", "330", "--output", str(model)]) == 0
    build = ["data", "build", "--input", str(text_folder), "--tokenizer", str(model), "--output", str(out), "--verify"]
    assert main(build) == 0
    assert "out: 1 shard(s), 150 documents: sound" in capsys.readouterr().out
    manifest = load_manifest(out)
    assert (manifest.documents, manifest.tokenizer_sha256) == (150, Tokenizer(model).sha256)
    assert main(["data", "show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert manifest.sha256 in shown and "documents        150" in shown


def test_splits_do_not_overlap(text_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    counts = []
    for split in ("train", "valid"):
        where = ["--tokenizer", str(tokenizer.path), "--output", str(tmp_path / split), "--split", split]
        assert main(["data", "build", "--input", str(text_folder), *where]) == 0
        counts.append(load_manifest(tmp_path / split).documents)
    assert sum(counts) == 150 and counts[0] > counts[1] > 0


def test_damage_is_reported_with_exit_code_1(
    text_folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        main(["data", "build", "--input", str(text_folder), "--tokenizer", str(tokenizer.path), "--output", str(out)])
        == 0
    )
    shard = out / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    assert main(["data", "verify", str(out)]) == 1
    captured = capsys.readouterr()
    assert "shard-000000.tar: document 0 " in captured.err and "1 problem(s)" in captured.out


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(tmp_path / "nowhere")]) == 2
    assert (
        main(["data", "build", "--input", "x", "--tokenizer", str(tmp_path / "t"), "--output", str(tmp_path / "o")])
        == 2
    )
    assert main(["tokenizer", "train", "--input", str(tmp_path / "no"), "--output", str(tmp_path / "t")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("megatron-md: ") for line in lines)
    assert list(tmp_path.iterdir()) == []

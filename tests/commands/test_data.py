"""`data`: from text to verified shards, and what `show` says: totals, lengths, rows as a run reads them, its masks."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.batch import BatchPosition
from megatron_md.cli import main
from megatron_md.commands.show import length_histogram, masks_of_row
from megatron_md.config import ObjectiveConfig
from megatron_md.data.builder import build_shards
from megatron_md.data.corpus import documents
from megatron_md.data.entries import Document, Entry
from megatron_md.data.shards import Manifest, content_hash, load_manifest
from megatron_md.data.stream import SequenceStream, micro_batches
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.objective import build_objective
from tests.data.small_corpus import flip_byte, made_up_code


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
    flip_byte(out / "shard-000000.tar", 600)
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


def test_tables_damaged_files_and_long_documents(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in ("fine", "x" * 99, "good")))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"body": "cut"}).encode())[:-4])
    build = ["data", "build", "--input", str(folder), "--tokenizer", str(tokenizer.path), "--text-key", "body"]
    build += ["--max-document-bytes", "60", "--output", str(tmp_path / "out")]
    assert main(build) == 2
    assert "b.jsonl.gz: damaged or cut compressed data" in capsys.readouterr().err
    assert main([*build, "--skip-damaged"]) == 0
    assert "2 documents" in capsys.readouterr().out
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["name"], entry["reason"]) for entry in rejected] == [
        ("a.jsonl#2", "too long"),
        ("b.jsonl.gz", "damaged file"),
    ]
    assert "restore the file" in rejected[1]["detail"]


def test_documents_in_are_documents_written_and_rejected_of_every_kind(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in {"a.txt": b"fine", "b.txt": b"", "c.txt": b"\xff", "d.txt": b"x" * 99}.items():
        (folder / name).write_bytes(data)
    lines = [b'{"text": "fine"}', b"{broken", b'{"body": 1}', b'{"text": "\\ud800"}', b'{"text": ""}', b"[" * 99]
    (folder / "e.jsonl").write_bytes(b"\n".join(lines))
    with tarfile.open(folder / "f.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("fine.txt", "../up.txt", "evil.pyd", "link.txt"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.SYMTYPE if name == "link.txt" else tarfile.REGTYPE
            info.size = 0 if name == "link.txt" else 4
            tar.addfile(info, io.BytesIO(b"fine"))
    (folder / "g.tar").write_bytes((folder / "f.tar").read_bytes()[:1024])
    (folder / "h.jsonl.gz").write_bytes(gzip.compress(lines[0] + b"\n")[:-4])
    (folder / "i.jsonl.gz").write_bytes(gzip.compress(bytes(96 << 20)))
    build = ["data", "build", "--input", str(folder), "--tokenizer", str(tokenizer.path), "--skip-damaged"]
    assert main([*build, "--max-document-bytes", "60", "--output", str(tmp_path / "out")]) == 0
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    expected = {"empty": 2, "not decodable": 1, "too long": 2, "malformed JSON": 1, "no text field": 1,
                "not encodable as UTF-8": 1, "unsafe name": 1, "not text": 1, "not a regular file": 1,
                "damaged tar": 1, "damaged file": 1, "decompression bomb": 1}  # fmt: skip
    assert Counter(entry["reason"] for entry in rejected) == expected
    manifest = load_manifest(tmp_path / "out")
    assert manifest.source["rejected"] == expected
    # Four texts, six lines, four members, the member before the cut, a line, and the three damaged files.
    assert manifest.documents == 5 and manifest.documents + len(rejected) == 4 + 6 + 4 + 1 + 1 + 3


def test_inputs_and_outputs_that_cannot_be_are_one_line(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.bin2"
    file.write_text("text")
    (tmp_path / "x.txt").write_text("text")
    for source, output, message in [
        (file, "o", "x.bin2: unknown kind of file, none of .jsonl, "),
        ("datasets:", "o", "datasets:: names no data set; write datasets:NAME[:CONFIG[:SPLIT]]"),
        ("datasets:a:b:c:d", "o", "names no data set"),
        (tmp_path / "x.txt", "x.txt/o", "x.txt/o: cannot be made (Not a directory); give another --output"),
    ]:
        words = ["--input", str(source), "--tokenizer", str(tokenizer.path), "--output", str(tmp_path / output)]
        assert main(["data", "build", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin2", "x.txt"]


@pytest.mark.parametrize("words", [["index"], ["build", "--index", "--input"]])
def test_tars_made_elsewhere_are_indexed(
    text_folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    where = ["--tokenizer", str(tokenizer.path)]
    assert main(["data", "build", "--input", str(text_folder), *where, "--output", str(tmp_path / "built")]) == 0
    (tmp_path / "tars").mkdir()
    (tmp_path / "built" / "shard-000000.tar").rename(tmp_path / "tars" / "shard-000000.tar")
    assert main(["data", *words, str(tmp_path / "tars"), *where, "--verify"]) == 0
    assert "tars: 1 shard(s), 150 documents: sound" in capsys.readouterr().out
    if words[0] == "build":
        assert main(["data", *words, str(tmp_path / "tars"), *where, "--output", "x"]) == 2
        assert main(["data", "build", "--input", str(text_folder), *where]) == 2
        assert "--output is missing" in capsys.readouterr().err


def test_an_interrupted_build_says_how_to_go_on(
    text_folder: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = ["data", "build", "--input", str(text_folder), "--tokenizer", str(tokenizer.path), "--shard-tokens", "99"]
    with monkeypatch.context() as patch:
        patch.setattr("megatron_md.data.builder.BATCH_CHARACTERS", 100)
        patch.setattr("megatron_md.data.builder.documents", interrupted)
        assert main([*build, "--output", str(tmp_path / "out")]) == 1
    assert "out.partial keeps what is done: the same command goes on from there" in capsys.readouterr().err
    assert main([*build, "--output", str(tmp_path / "out")]) == 0
    assert main([*build, "--output", str(tmp_path / "whole")]) == 0
    assert load_manifest(tmp_path / "out").sha256 == load_manifest(tmp_path / "whole").sha256


def interrupted(*args: Any, **options: Any) -> Iterator[Entry]:
    yield from itertools.islice(documents(*args, **options), 50)
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def manifest(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    texts = [Document(f"{number}.py", made_up_code(number)) for number in range(40)]
    return build_shards(texts, tokenizer.path, tmp_path_factory.mktemp("show") / "corpus")


def test_histogram_bins_double_and_hold_every_document() -> None:
    bins = length_histogram(np.array([0, 0, 1, 2, 3, 3, 4, 7, 8, 1000]))
    assert bins[:5] == [(0, 0, 2), (1, 1, 1), (2, 3, 3), (4, 7, 2), (8, 15, 1)]
    assert bins[-1] == (512, 1023, 1) and sum(count for _, _, count in bins) == 10


def test_totals_always_and_lengths_on_request(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(manifest.directory)]) == 0
    totals = capsys.readouterr().out
    assert manifest.sha256 in totals and "documents        40" in totals and "nats/token" not in totals
    assert main(["data", "show", str(manifest.directory), "--stats"]) == 0
    stats = capsys.readouterr().out
    assert stats.startswith(totals) and "nats/token" in stats and "█" in stats


def test_a_foreign_manifest_commands_no_terminal(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "[red]a\x1b[2Jb"
    shutil.copytree(manifest.directory, folder)
    content = json.loads((folder / "manifest.json").read_text())
    content["source"]["[bold]\u202e"] = "\x9b31m\nforged: 1"
    content["shards"][0]["name"] = "gone\x1b[2J\n.tar"
    content["sha256"] = content_hash(content)
    (folder / "manifest.json").write_text(json.dumps(content))
    assert main(["data", "show", str(folder)]) == 2  # the shard is not there
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and r"gone\x1b[2J\n.tar: missing shard" in said and said.isprintable() is False
    assert not {"\x1b", "\x9b", "\u202e"} & set(said)
    content["shards"][0]["name"] = manifest.shards[0].name
    content["sha256"] = content_hash(content)
    (folder / "manifest.json").write_text(json.dumps(content))
    assert main(["data", "show", str(folder)]) == 0
    assert main(["data", "verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert not {"\x1b", "\x9b", "\u202e"} & set(said)
    assert r"[red]a\x1b[2Jb" in said.splitlines()[0] and "[bold]" in said and "\nforged" not in said


def test_rows_are_those_of_a_run(manifest: Manifest, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--row", "5", "--seed", "3", "--seq-length", "512", "--tokenizer", str(tokenizer.path)]
    assert main(["data", "show", str(manifest.directory), *words]) == 0
    shown = capsys.readouterr().out
    rows = SequenceStream(manifest, seed=3, seq_length=512).rows([5])
    cuts = rows.cu_seqlens[0].tolist()
    assert len(cuts) > 2
    for number, (begin, end) in enumerate(pairwise(cuts), start=1):
        assert f"document {number}, positions {begin} to {end - 1}" in shown
        assert tokenizer.decode(rows.tokens_BL[0, begin:end], show_special=True).strip("\n") in shown
    assert main(["data", "show", str(manifest.directory), *words[:-2]]) == 0
    assert " ".join(map(str, rows.tokens_BL[0, : cuts[1]])) in capsys.readouterr().out


def test_masks_are_those_of_a_run(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    stream = SequenceStream(manifest, seed=3, seq_length=64)
    batch = micro_batches(stream, BatchPosition(16, 8), 8, data_rank=0, data_size=1)[0]
    objective = build_objective(
        ObjectiveConfig(mask_schedule="uniform:0.2,0.8"), seed=3, mask_token_id=manifest.mask_id
    )
    corrupted = objective.corrupt(batch)
    for g in (16, 19, 23):
        is_masked_L, rate = masks_of_row(stream.rows([g]), "uniform:0.2,0.8", 3, 8, manifest.mask_id)
        np.testing.assert_array_equal(is_masked_L, corrupted.tokens_BL[g - 16] == manifest.mask_id)
        assert rate == corrupted.mask_rate_B[g - 16]
    show = ["data", "show", str(manifest.directory), "--row", "19", "--masks", "uniform:0.2,0.8", "--seed", "3"]
    assert main([*show, "--seq-length", "64", "--global-batch-size", "8"]) == 0
    shown = capsys.readouterr().out
    masked = [word for run in shown.split("⟦")[1:] for word in run.split("⟧")[0].split()]
    assert list(map(int, masked)) == batch.tokens_BL[3][corrupted.tokens_BL[3] == manifest.mask_id].tolist()
    assert f"{len(masked)} masked" in shown
    assert "whose global batches all have 8 rows (no train.batch_ramp)" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--masks", "uniform:0,1"], "name them with --row G"),
        (["--row", "-1"], "numbered from 0"),
        (["--row", str(2**63)], "below 2**63"),
        (["--row", "0", "--seed", "-1"], "--seed -1: must be at least 0"),
        (["--row", "0", "--seq-length", str(10**14)], "at most 16777216 tokens"),
        (["--row", "0", "--masks", "sometimes"], "mask_schedule"),
        (["--seq-length", "0"], "must be at least 1"),
        (["--row", "0", "--tokenizer", "none.model"], "none.model"),
    ],
)
def test_bad_options_of_show_are_one_line(
    manifest: Manifest, words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["data", "show", str(manifest.directory), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line

"""`data show`: totals, lengths, rows as a run reads them, and the masks that it draws."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_md.batch import BatchPosition
from megatron_md.cli import main
from megatron_md.commands.data import length_histogram, masks_of_row
from megatron_md.config import ObjectiveConfig
from megatron_md.data.builder import build_shards
from megatron_md.data.corpus import Document
from megatron_md.data.shards import Manifest, content_hash
from megatron_md.data.stream import SequenceStream, micro_batches
from megatron_md.data.tokenizer import Tokenizer, train_tokenizer
from megatron_md.diffusion.objective import build_objective
from tests.data.small_corpus import made_up_code


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    documents = [Document(str(number), made_up_code(number)) for number in range(60)]
    return train_tokenizer(documents, 330, tmp_path_factory.mktemp("tokenizer") / "small.model")


@pytest.fixture(scope="module")
def manifest(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    documents = [Document(f"{number}.py", made_up_code(number)) for number in range(40)]
    return build_shards(documents, tokenizer.path, tmp_path_factory.mktemp("show") / "corpus")


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
def test_bad_input_is_one_line(
    manifest: Manifest, words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["data", "show", str(manifest.directory), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line

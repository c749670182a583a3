"""`data build --chat` and `data show` of dialogues: the report, prompts and answers in rows, flags without sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.cli import main
from megatron_md.commands.show import masks_of_row
from megatron_md.config import ChatConfig
from megatron_md.data.chat_rows import DialogueStream
from megatron_md.data.shards import load_manifest
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.token_rates import parse_token_rate

SEQ_LENGTH = 96


def dialogue(number: int) -> dict[str, Any]:
    return {"prompt": f"noise\x1b[2J {number}?", "completion": f"clean = {number}\nself.value"}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    bad = [{"prompt": "x", "completion": ""}, {"conversations": [{"from": "human", "value": "x"}]}]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*map(dialogue, range(40)), *bad]))
    return path


@pytest.fixture
def corpus(lines: Path, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    assert build(lines, tokenizer, tmp_path / "corpus", "--template", "plain") == 0
    return tmp_path / "corpus"


def build(lines: Path, tokenizer: Tokenizer, output: Path, *words: str) -> int:
    where = ["--input", str(lines), "--tokenizer", str(tokenizer.path), "--output", str(output)]
    return main(["data", "build", "--chat", *where, *words])


def test_a_build_reports_lengths_and_answers(
    lines: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    assert build(lines, tokenizer, corpus, "--template", "plain") == 0
    built = capsys.readouterr().out
    assert "corpus: 40 documents" in built and "rejected: 1 empty answer, 1 no assistant turn" in built
    manifest = load_manifest(corpus)
    share = f"{manifest.answer_tokens} tokens, {manifest.answer_tokens / manifest.tokens:.1%} of all"
    assert f"answers: {share}; tokens/document min: " in built
    assert main(["data", "show", str(corpus)]) == 0
    shown = capsys.readouterr().out
    assert f"answers          {share}" in shown and "lengths          min: " in shown
    assert "'template': 'plain'" in shown and "{%" not in shown


@pytest.mark.parametrize("keys", [[], ["rows=packed", "eos_padding=one"]])
def test_rows_show_prompts_answers_and_masks(
    keys: list[str], corpus: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = load_manifest(corpus)
    packed = ChatConfig(rows="packed", eos_padding="one") if keys else ChatConfig()
    rows = DialogueStream(manifest, packed, seed=7, seq_length=SEQ_LENGTH).rows([3])
    options = ["--row", "3", "--seed", "7", "--seq-length", str(SEQ_LENGTH), "--global-batch-size", "4"]
    if keys:
        options += ["--chat", *keys]
    capsys.readouterr()
    assert main(["data", "show", str(corpus), *options, "--tokenizer", str(tokenizer.path)]) == 0
    shown = capsys.readouterr().out
    (number,) = {n for n in range(40) if f"noise\\x1b[2J {n}?" in shown} if not keys else {None}
    if number is not None:
        assert f"User:\nnoise\\x1b[2J {number}?\nAssistant:\n⟪clean = {number}\nself.value<eos><eos>" in shown
    assert "\x1b" not in shown and "⟦" not in shown
    assert shown.count("⟪") == len(rows.cu_seqlens[0]) - (1 if not keys else 2)  # type: ignore[index]
    is_masked_L, _ = masks_of_row(rows, "uniform:0.9,1", 7, 4, manifest.mask_id)
    assert main(["data", "show", str(corpus), *options, "--masks", "uniform:0.9,1"]) == 0
    line = capsys.readouterr().out
    assert "no data.random_length_fraction" not in line
    hidden = [token for part in line.split("⟦")[1:] for token in part.split("⟧")[0].split()]
    # In a padded row, what lies behind the longest dialogue of the batch is cut off.
    expected = rows.tokens_BL[0, np.flatnonzero(is_masked_L)].tolist()
    assert list(map(int, hidden)) == expected[: len(hidden)]
    assert set(expected[len(hidden) :]) <= {manifest.eos_id} and len(hidden) > 5


def test_templates_that_spell_their_marks_say_so(
    lines: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(lines, tokenizer, tmp_path / "out", "--template", "chatml", "--turns", "split", "--verify") == 0
    captured = capsys.readouterr()
    assert "chat template chatml: what ends an answer (<|im_end|>) is no token of this tokenizer" in captured.err
    assert "sound" in captured.out
    source = load_manifest(tmp_path / "out").source["chat"]
    assert (source["template"]["name"], source["turns"]) == ("chatml", "split")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "holds no chat template; choose one by --template: llada"),
        (["--template", "nothing"], "no template 'nothing': give a .jinja file or one of llada"),
        (["--template", "plain", "--max-tokens", "0"], "--max-tokens 0: must be at least 1"),
        (
            ["--template", "plain", "--truncate", "left"],
            "--truncate says what becomes of documents beyond --max-tokens",
        ),
    ],
)
def test_bad_flags_are_one_line(
    words: list[str],
    message: str,
    lines: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert build(lines, tokenizer, tmp_path / "out", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_flags_of_dialogues_are_for_dialogues(
    corpus: Path, lines: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--input", str(lines), "--tokenizer", str(tokenizer.path), "--output", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(["data", "build", *where, "--turns", "split"]) == 2
    assert "--turns is for dialogues: say --chat" in capsys.readouterr().err
    assert main(["data", "build", *where, "--text-key", "completion"]) == 0
    assert main(["data", "show", str(tmp_path / "out"), "--row", "0", "--chat", "rows=padded"]) == 2
    assert "--chat rows=padded: " in capsys.readouterr().err
    assert main(["data", "show", str(corpus), "--row", "0", "--chat", "rws=padded"]) == 2
    assert "unknown key rws; did you mean rows?" in capsys.readouterr().err


def test_counts_of_tokens_are_written_for_token_rates(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "counts.json"
    assert main(["data", "show", str(corpus), "--counts", str(output)]) == 0
    manifest = load_manifest(corpus)
    counts = json.loads(output.read_text())
    assert len(counts) == manifest.vocab_size and min(counts) == 0 < counts[manifest.eos_id]
    spec = {"name": "frequency", "strength": 1, "counts": str(output)}
    assert parse_token_rate(spec) is not None
    for words, text in (
        (["--counts", "none/a.json"], "none does not exist"),
        ([str(corpus), "--counts", "a"], "one corpus"),
    ):
        capsys.readouterr()
        assert main(["data", "show", str(corpus), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line

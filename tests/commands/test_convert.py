"""The command: both directions, the table, refusals in one line."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_md.checkpoint import bridge
from megatron_md.cli import main
from tests.checkpoint.hf_models import contents, shape_of, write_model

WORDS = ("--family", "llama", "--to")


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "hf", "qwen2", shape_of("qwen2"))
    hf, run, back = (str(tmp_path / name) for name in ("hf", "run", "back"))
    assert main(["convert", hf, run, "--family", "qwen2", "--to", "megatron", "--dry-run"]) == 0
    assert not Path(run).exists()
    printed = capsys.readouterr().out
    assert "decoder.layers.self_attention.linear_qkv.weight [4, 64, 32]\n    = by query group" in printed
    assert main(["convert", hf, run, "--family", "qwen2", "--to", "megatron"]) == 0
    assert "checkpoint.load=" + run in capsys.readouterr().out
    assert main(["convert", run, back, "--family", "qwen2", "--to", "hf", "--dry-run"]) == 0
    assert main(["convert", run, back, "--family", "qwen2", "--to", "hf"]) == 0
    assert contents(Path(back)) == contents(Path(hf))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_between_two_tensors_and_leaves_nothing(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "hf", "llama", shape_of("llama"))
    hf, run, back = (str(tmp_path / name) for name in ("hf", "run", "back"))
    there, again = (["convert", hf, run, *WORDS, "megatron"], ["convert", run, back, *WORDS, "hf"])
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    for words, place in ((there, "bridge.merge"), (again, "bridge.split")):
        original = getattr(bridge, place.removeprefix("bridge."))
        made: list[None] = []

        def interrupted(*args: Any, original: Any = original, made: list[None] = made) -> Any:
            made.append(None)
            if len(made) == 3:
                os.kill(os.getpid(), number)
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(f"megatron_md.checkpoint.{place}", interrupted)
            assert main(words) == 1
        assert capsys.readouterr().err == "megatron-md: interrupted\n" and len(made) == 3
        assert not Path(words[2]).exists() and not list(tmp_path.glob(".writing*"))
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert main(words) == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["{hf}", "{new}", "--family", "bert", "--to", "megatron"], "--family bert: unknown; known are llada"),
        (["{hf}", "{hf}", "--family", "llama", "--to", "megatron"], "exists already; choose another folder"),
        (["{hf}", "{new}", "--family", "llama", "--to", "hf"], "neither a run directory with a complete checkpoint"),
        (["{no}", "{new}", "--family", "llama", "--to", "megatron"], "nowhere: no such folder"),
        (["{hf}", "{new}", "--family", "llama", "--to", "hf", "--add-mask-token"], "belongs to --to megatron"),
        (["{hf}", "{new}", "--family", "llama", "--to", "megatron", "--add-mask-token"], "tokenizer.json: missing"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "hf", "llama", shape_of("llama"))
    names = {"hf": tmp_path / "hf", "new": tmp_path / "new", "no": tmp_path / "nowhere"}
    assert main(["convert", *(word.format(**names) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line
    assert not (tmp_path / "new").exists()

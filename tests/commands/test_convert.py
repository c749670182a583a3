"""The command: both directions, the table, refusals in one line."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_md.checkpoint.hf import tensors
from megatron_md.cli import main
from tests.checkpoint.hf_models import contents, shape_of, write_byte_tokenizer, write_model
from tests.data.small_corpus import made_up_code
from tests.ranks import run_ranks
from tests.test_docs import main_in

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


@pytest.mark.slow
@pytest.mark.distributed
def test_the_commands_of_the_llada_example_work_one_after_the_other(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples/continue_llada_8b.yaml"
    model = replace(shape_of("llada", vocab=320), max_length=64)
    write_model(tmp_path / "LLaDA-8B-Base", "llada", model, mask_token_id=310, eos_token_id=300, dtype=torch.bfloat16)
    write_byte_tokenizer(tmp_path / "LLaDA-8B-Base")
    (tmp_path / "TEXT").mkdir()
    for number in range(60):
        (tmp_path / "TEXT" / f"{number}.txt").write_text(made_up_code(number))
    (tmp_path / "examples").symlink_to(example.parent)
    widths = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "max_length", "rope_theta", "norm_eps")
    small = [f"model.{key}={getattr(model, key)}" for key in widths]
    small += ["parallel.tensor=1", "parallel.sequence_parallel=false", "data.seq_length=64", "train.steps=2"]
    small += ["train.global_batch_size=4", "validation.sequences=4", "log.tensorboard=false", "train.device=cpu"]
    lines = [line.removeprefix("#   megatron-md ") for line in example.read_text().splitlines() if "#   meg" in line]
    assert [line.split()[0] for line in lines] == ["convert", "data", "data", "train", "convert"]
    for line in lines:
        words = line.replace(" --nproc-per-node 8", "").split()
        assert run_ranks(main_in, 1, tmp_path, words + (small if words[0] == "train" else [])) == [0], line
    before, after = (contents(tmp_path / name) for name in ("LLaDA-8B-Base", "LLaDA-8B-continued"))
    assert before.keys() == after.keys()
    changed = {name for name, data in before.items() if after[name] != data}
    assert changed and all(name.endswith(".safetensors") for name in changed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_between_two_tensors_and_leaves_nothing(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "hf", "llama", shape_of("llama"))
    hf, run, back = (str(tmp_path / name) for name in ("hf", "run", "back"))
    there, again = (["convert", hf, run, *WORDS, "megatron"], ["convert", run, back, *WORDS, "hf"])
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    for words, place in ((there, "merge"), (again, "split")):
        original = getattr(tensors, place)
        made: list[None] = []

        def interrupted(*args: Any, original: Any = original, made: list[None] = made) -> Any:
            made.append(None)
            if len(made) == 3:
                os.kill(os.getpid(), number)
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(tensors, place, interrupted)
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
        (["{no}", "{new}", "--family", "llama", "--to", "megatron"], "nowhere: no such file or folder"),
        (["{hf}", "{new}", "--family", "llama", "--to", "hf", "--add-mask-token"], "belongs to --to megatron"),
        (["{hf}", "{new}", "--family", "llama", "--to", "megatron", "--add-mask-token"], "tokenizer.json: missing"),
        (
            ["{hf}", "{new}", "--family", "llama", "--to", "megatron", "--block-size", "4"],
            "--block-size is said of a folder of sdar that goes --to megatron",
        ),
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

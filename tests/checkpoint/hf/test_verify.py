"""Our logits are those of transformers' own classes, under both attention masks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_md import run_files
from megatron_md.checkpoint.hf.families import FAMILIES
from tests.checkpoint.hf.test_convert import convert, export
from tests.checkpoint.hf_models import FAMILY_NAMES, shape_of, write_byte_tokenizer, write_model
from tests.ranks import run_ranks

pytest.importorskip("transformers")


def lines(folder: Path, run: Path, family: str) -> list[str]:
    """On one rank: what --verify prints."""
    from megatron_md.checkpoint.hf.verify import compare_logits

    return list(compare_logits(folder, run, FAMILIES[family]))


def relative(line: str) -> float:
    return float(re.search(r"\((\S+) relative\)", line)[1])  # type: ignore[index]


@pytest.mark.parametrize(
    "family",
    [name if name == "llada" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY_NAMES],
)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    for keys in ({"tied": False, "kv_heads": 2}, {"tied": True, "kv_heads": 4}):
        base = tmp_path / str(keys["tied"])
        write_model(base / "hf", family, shape_of(family, vocab=320, **keys), std=0.05)
        write_byte_tokenizer(base / "hf")
        convert(base / "hf", base / "run", family)
        (report,) = run_ranks(lines, 1, base / "hf", base / "run", family)
        assert [line.partition(":")[0] for line in report] == [
            f"{precision}, {attention} attention, {text}"
            for precision in ("fp32", "bf16")
            for attention in ("bidirectional", "causal")
            for text in ("random tokens", "demo text")
        ]
        assert all(relative(line) <= 2e-5 for line in report[:4]), report
        assert all(1e-5 < relative(line) <= 0.05 for line in report[4:]), report


def test_other_weights_are_noticed_and_a_missing_tokenizer_is_told(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llama", shape_of("llama"), std=0.05)
    write_model(tmp_path / "other", "llama", shape_of("llama"), std=0.06)
    convert(tmp_path / "other", tmp_path / "run", "llama")
    ((first, *report),) = run_ranks(lines, 1, tmp_path / "hf", tmp_path / "run", "llama")
    assert first.startswith("demo text: left out, ") and "no such tokenizer file" in first
    assert len(report) == 4 and all(relative(line) > 1e-2 for line in report)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow), "qwen3"])
def test_transformers_opens_an_exported_folder(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tensors = write_model(tmp_path / "hf", family, shape_of(family))
    convert(tmp_path / "hf", tmp_path / "run", family)
    shutil.rmtree(tmp_path / "run" / run_files.ORIGINAL)  # so that config.json is written anew
    export(tmp_path / "run", tmp_path / "back", family)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())

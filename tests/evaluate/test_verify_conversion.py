"""Our logits are those of transformers' own classes, under both attention masks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_md.checkpoint.families import FAMILIES
from tests.checkpoint.hf_models import FAMILY_NAMES, shape_of, write_model
from tests.checkpoint.test_conversion import convert
from tests.ranks import run_ranks

pytest.importorskip("transformers")


def lines(folder: Path, run: Path, family: str) -> list[str]:
    """On one rank: what --verify prints."""
    from megatron_md.evaluate.verify_conversion import compare_logits

    return list(compare_logits(folder, run, FAMILIES[family]))


def relative(line: str) -> float:
    return float(re.search(r"\((\S+) relative\)", line)[1])  # type: ignore[index]


@pytest.mark.parametrize(
    "family",
    [name if name in ("llada", "qwen3") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY_NAMES],
)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    for tied in (False, True):
        base = tmp_path / str(tied)
        write_model(base / "hf", family, shape_of(family, tied=tied), std=0.05)
        convert(base / "hf", base / "run", family)
        (report,) = run_ranks(lines, 1, base / "hf", base / "run", family)
        fp32, bf16 = report[:2], report[2:]
        assert "fp32, bidirectional" in fp32[0] and "fp32, causal" in fp32[1]
        assert all(relative(line) <= 2e-5 for line in fp32), report
        assert all(1e-5 < relative(line) <= 0.05 for line in bf16), report


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llama", shape_of("llama"), std=0.05)
    write_model(tmp_path / "other", "llama", shape_of("llama"), std=0.06)
    convert(tmp_path / "other", tmp_path / "run", "llama")
    (report,) = run_ranks(lines, 1, tmp_path / "hf", tmp_path / "run", "llama")
    assert all(relative(line) > 1e-2 for line in report)

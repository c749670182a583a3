"""What only a CUDA device can show: the kernels and NCCL do what the CPU and gloo do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.cli import main
from tests.checkpoint.legs import leg
from tests.ranks import run_ranks
from tests.small_run import variant
from tests.train.test_step import assert_same, train
from tests.train.test_trainer import STEPS, config_for, metrics, pretrain, without_times, write_bigram_corpus

pytestmark = pytest.mark.gpu

CPU, CUDA = {"device": "cpu"}, {"device": "cuda"}
CASES: dict[str, dict[str, Any]] = {
    "masked diffusion": {},
    "autoregressive": {"objective": {"name": "autoregressive"}},
    "untied": {"model": {"tied": False}},
    "distributed optimizer": {"parallel": {"distributed_optimizer": True}},
    "overlap": {"parallel": {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}},
    "recomputation": {"train": {"recompute": "full"}},
    "within documents": {"data": {"document_attention": "within_document"}},
    "many groups": {"model": {"kv_heads": 1}, "train": {"micro_batch_size": 8}},
}


@pytest.fixture(autouse=True)
def fp32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the ranks, which are started anew: TF32 keeps ten bits of the mantissa, the CPU all of them."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")


def on(device: dict[str, str], **sections: dict[str, Any]) -> Any:
    """The small run on a device."""
    return variant(**{**sections, "train": {**sections.get("train", {}), **device}})


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_cpu(name: str) -> None:
    there, here = (run_ranks(train, 1, on(device, **CASES[name]), 5) for device in (CPU, CUDA))
    assert_same(here, there[0])


@pytest.mark.parametrize("keys", [{}, {"recompute": "selective"}], ids=str)
def test_bf16_stays_near_fp32(keys: dict[str, Any]) -> None:
    sharded = {"distributed_optimizer": True}
    exact, rounded = (
        run_ranks(train, 1, on(CUDA, parallel=sharded, train={"precision": precision, **keys}), 20)[0]["curve"]
        for precision in ("fp32", "bf16")
    )
    np.testing.assert_allclose(rounded, exact, rtol=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(precision: str, tmp_path: Path) -> None:
    corpora = {"train": write_bigram_corpus(tmp_path / "train", 60, 0)}
    corpora["valid"] = write_bigram_corpus(tmp_path / "valid", 10, 1)
    keys: dict[str, Any] = {
        "parallel": {"distributed_optimizer": True},
        "train": {"precision": precision, "deterministic": True, **CUDA},
    }
    whole, parts = (config_for(tmp_path / name, corpora, **keys) for name in ("whole", "parts"))
    cut = replace(parts, checkpoint=replace(parts.checkpoint, every_steps=3), train=replace(parts.train, steps=STEPS))
    run_ranks(pretrain, 1, whole)
    from tests.train.test_trainer import pretrain_and_die_after

    run_ranks(pretrain_and_die_after, 1, cut, 4)
    run_ranks(pretrain, 1, cut)
    assert without_times(metrics(tmp_path / "parts")) == without_times(metrics(tmp_path / "whole"))
    assert metrics(tmp_path / "whole")[-1]["loss"] < metrics(tmp_path / "whole")[0]["loss"]


def test_a_run_goes_from_one_device_to_the_other(tmp_path: Path) -> None:
    sharded = {"distributed_optimizer": True}
    curves = []
    for folder, devices in (("cpu", (CPU, CPU)), ("there", (CPU, CUDA)), ("back", (CUDA, CPU))):
        first, second = (on(device, parallel=sharded, train={"global_batch_size": 12}) for device in devices)
        curve = run_ranks(leg, 1, first, tmp_path / folder, 0, 3, True)[0]
        curves.append(curve + run_ranks(leg, 1, second, tmp_path / folder, 3, 6, False)[0])
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=1e-4)


def command(words: list[str]) -> int:
    """On a rank of its own: CUDA and the CPU's stand-ins do not share a process."""
    return main(words)


def test_likelihoods_and_texts_are_those_of_the_cpu(trained: Path, tmp_path: Path) -> None:
    import json

    for run in ("run", "causal"):
        found, texts = [], []
        for device in ("cpu", "cuda"):
            where = ["--device", device]
            figures, lines = tmp_path / f"{run}-{device}.json", tmp_path / f"{run}-{device}.jsonl"
            words = [str(trained / run), *where]
            nelbo = ["--nelbo", str(trained / "valid"), "--rows", "16", "--json", str(figures)]
            assert run_ranks(command, 1, ["evaluate", *words, *nelbo]) == [0]
            assert run_ranks(command, 1, ["generate", *words, "--length", "12", "--output", str(lines)]) == [0]
            found.append(json.loads(figures.read_text()))
            texts.append(json.loads(lines.read_text())["text"])
        assert found[1]["nelbo"] == pytest.approx(found[0]["nelbo"], rel=1e-5)
        assert found[1]["stderr"] == pytest.approx(found[0]["stderr"], rel=1e-3)
        assert texts[1] == texts[0]

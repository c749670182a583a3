"""Our logits are those of transformers' own classes, under both attention masks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md import run_files
from megatron_md.checkpoint.hf.families import FAMILIES
from tests.checkpoint.hf.test_convert import convert, export
from tests.checkpoint.hf_models import BLOCK_SIZE, FAMILY_NAMES, shape_of, write_byte_tokenizer, write_model
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
    [name if name in ("llada", "sdar") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY_NAMES],
)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    for keys in ({"tied": False, "kv_heads": 2}, {"tied": True, "kv_heads": 4}):
        base = tmp_path / str(keys["tied"])
        write_model(base / "hf", family, shape_of(family, vocab=320, **keys), std=0.05)
        write_byte_tokenizer(base / "hf")
        convert(base / "hf", base / "run", family)
        (report,) = run_ranks(lines, 1, base / "hf", base / "run", family)
        both = ("bidirectional attention", "causal attention")
        assert [line.partition(":")[0] for line in report] == [
            f"{precision}, {attention}, {text}"
            for precision in ("fp32", "bf16")
            for attention in (("attention in blocks of 4",) if family == "sdar" else both)
            for text in ("random tokens", "demo text")
        ]
        half = len(report) // 2
        assert all(relative(line) <= 2e-5 for line in report[:half]), report
        assert all(1e-5 < relative(line) <= 0.05 for line in report[half:]), report


def asked_as_in_training_and_as_in_sampling(folder: Path, run: Path) -> list[np.ndarray[Any, Any]]:
    """On one rank: the NLLs of masked tokens, from our rows [x_t, x_0] and from Qwen3, which is given one block a call.

    SDAR's sampler has the finished blocks in its cache and asks for the next one, whose tokens are masked or not; it
    takes the logits at a position for that position.
    """
    from megatron_md import parallel
    from megatron_md.batch import BatchPosition, CleanBatch
    from megatron_md.checkpoint.directory import find_checkpoint
    from megatron_md.checkpoint.hf.folder import HuggingFaceFolder
    from megatron_md.checkpoint.hf.verify import our_model, reference_logits, reference_model
    from megatron_md.config import load_config
    from megatron_md.diffusion.objective import build_objective
    from megatron_md.train.inference import Inference

    keys = ["objective.mask_schedule=uniform:0.2,0.8", "train.device=cpu", "train.precision=fp32"]
    config = load_config(run / "config.yaml", [*keys, "parallel.distributed_optimizer=false"])
    rows, length, mask = 2, 24, 5
    generator = np.random.default_rng(0)
    clean = CleanBatch(
        generator.integers(6, 67, (rows, length)), np.ones((rows, length), dtype=bool), np.arange(rows),
        BatchPosition(0, rows),
    )  # fmt: skip
    corrupted = build_objective(config.objective, seed=1, mask_token_id=mask).corrupt(clean)
    with HuggingFaceFolder(folder) as hf:
        network = reference_model(hf, FAMILIES["sdar"], torch.float32)
    theirs = []
    for row, place in zip(*np.divmod(corrupted.positions_M, 2 * length), strict=True):
        start = place - place % BLOCK_SIZE
        seen = np.concatenate([clean.tokens_BL[row, :start], corrupted.tokens_BL[row, start : start + BLOCK_SIZE]])
        logits = reference_logits(network, torch.from_numpy(seen)[None], causal=False, block_size=BLOCK_SIZE)
        theirs.append(-logits[0, place].log_softmax(dim=-1)[clean.tokens_BL[row, place]].item())
    with parallel.session(config) as world:
        chunk = our_model(config, find_checkpoint(run), causal=False)
        inference = Inference(config, world, [chunk], causal=False, mask_token_id=mask)
        (ours,) = inference.negative_log_likelihoods([corrupted]) or []
    return [ours, np.array(theirs)]


def test_a_block_model_scores_what_sdar_s_sampler_would_see(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "sdar", shape_of("sdar"))
    convert(tmp_path / "hf", tmp_path / "run", "sdar")
    export(tmp_path / "run", tmp_path / "back", "sdar")
    ((ours, theirs),) = run_ranks(asked_as_in_training_and_as_in_sampling, 1, tmp_path / "back", tmp_path / "run")
    assert len(ours) > 10 and np.std(ours) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


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

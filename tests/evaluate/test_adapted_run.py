"""A run with adapters is evaluated and written with like any other, on its base; and like the merged run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import megatron_md as md
from megatron_md.checkpoint.base import recorded_base
from megatron_md.cli import main
from megatron_md.config import LoraConfig
from megatron_md.evaluate.card import identity_of
from megatron_md.run.saved import Placement, open_run
from tests.ranks import run_ranks
from tests.train.test_trainer import pretrain
from tests.trained_run import run_config


def looked_at(runs: list[Path], data: Path) -> list[tuple[float, list[int]]]:
    """On a rank: likelihood bound and a text of each run."""
    found = []
    for run in runs:
        report = md.evaluate(run, data, rows=4, passes=2, seed=1)
        found.append((report.nelbo, list(md.generate(run, "def ", length=8, steps=4).tokens)))
    return found


@pytest.mark.distributed
def test_adapters_are_evaluated_with_their_base(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(trained / "run")
    keys = {"optimizer": {"lr": 0.05}, "checkpoint": {"load": base, "load_only": "model"}}
    config = replace(run_config(trained, "lora", **keys), lora=LoraConfig(rank=4))
    assert run_ranks(pretrain, 1, config) == [0]
    assert main(["convert", str(trained / "lora"), str(trained / "merged"), "--to", "megatron"]) == 0
    runs = [trained / name for name in ("lora", "merged", "run")]
    (adapted, merged, before) = run_ranks(looked_at, 1, runs, trained / "valid")[0]
    assert adapted[0] == pytest.approx(merged[0], rel=1e-6) and adapted[1] == merged[1]
    assert adapted[0] != pytest.approx(before[0], rel=1e-4)
    summary = json.loads((trained / "lora" / "summary.json").read_text())
    assert summary["trained_parameters"] < summary["parameters"] and summary["val_nelbo"] > 0
    saved = open_run(trained / "lora", Placement(device="cpu"))
    base_of_it = recorded_base(saved.checkpoint)
    assert base_of_it is not None and identity_of(saved)["base"]["sha256"] == base_of_it.sha256
    capsys.readouterr()
    assert main(["inspect", str(trained / "lora"), "--verify"]) == 0
    assert "holds adapters on the weights of" in capsys.readouterr().out
    words = ["convert", str(trained / "lora"), str(trained / "never")]
    assert main([*words, "--to", "hf"]) == 2 and "--family is missing" in capsys.readouterr().err
    assert main([*words, "--to", "peft", "--family", "llada", "--dry-run"]) == 0
    assert "base_model.model.model.transformer.blocks.0.q_proj.lora_A.weight" in capsys.readouterr().out
    assert main([*words, "--to", "megatron", "--dry-run"]) == 0
    assert "+ alpha / rank x B_q A_q, B_k A_k, B_v A_v" in capsys.readouterr().out

"""A run of the transformer: its files, its metrics, and the same numbers on other layouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_md.parity.config import ParityConfig
from tests.parity.parity_config import small
from tests.ranks import run_ranks


def run(config: ParityConfig) -> dict[str, Any]:
    from megatron_md.parity.experiment import run_experiment

    return run_experiment(config)


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.parametrize("objective", ["masked_diffusion", pytest.param("direct_supervision", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layout", [{"tensor": 2}, {"pipeline": 2}, {"context": 2}, {}], ids=["TP2", "PP2", "CP2", "DP2"]
)
def test_the_same_run_on_every_layout(objective: str, layout: dict[str, Any], tmp_path: Path) -> None:
    keys: dict[str, Any] = {"objective": {"name": objective}, "task": {"n": 7}}
    one = small(tmp_path / "one", **keys)
    two = small(tmp_path / "two", **keys, parallel={**layout, "distributed_optimizer": not layout})
    summary = run_ranks(run, 1, one)[0]
    assert summary["status"] == "finished" and summary["step"] == 4
    summaries = run_ranks(run, 2, two)
    assert all(replace_time(other) == replace_time(summaries[0]) for other in summaries)
    names = ("loss", "grad_norm", "signal_loss", "noise_loss", "train_label_ce", "valid_label_ce", "weight_norm")
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert a["signal_loss"] + a["noise_loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert a.keys() == b.keys()
        for key in names:
            # A vocabulary of 3 is padded to 4 under TP2: the norm is to know nothing of that row.
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-5), key
    last = records(tmp_path / "one")[-1]
    assert 0.0 < last["train_accuracy"] <= 1.0 and 0.0 < last["valid_accuracy"] <= 1.0


def replace_time(summary: dict[str, Any]) -> str:
    """The summary without its seconds (as text: NaN is unequal to itself)."""
    return json.dumps({**summary, "seconds": 0})


@pytest.mark.distributed
def test_a_run_ends_where_it_has_reached_its_goal(tmp_path: Path) -> None:
    config = small(tmp_path, accuracy={"stop_at": 0.0}, train={"steps": 6})
    summary = run_ranks(run, 1, config)[0]
    assert summary["step"] == summary["reached_step"] == 2
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"
    endless = run_ranks(run, 1, replace(config, accuracy=replace(config.accuracy, stop_at=None)))[0]
    assert endless["step"] == 6

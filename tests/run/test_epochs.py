"""`train.epochs`: how many steps it comes to, what it is refused with, and that a run keeps the steps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_md.cli import main
from megatron_md.config import BatchRampConfig, Config, CorpusConfig, as_dict, config_from_mapping, load_config, to_yaml
from megatron_md.data.shards import load_manifest
from megatron_md.run.check import check_config
from megatron_md.run.epochs import count_steps
from megatron_md.train.progress import rows_before
from tests.ranks import run_ranks
from tests.small_run import LENGTH, variant
from tests.train.test_trainer import (
    config_for,
    metrics,
    pretrain,
    pretrain_and_die_after,
    without_times,
    write_bigram_corpus,
)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "train": write_bigram_corpus(folder / "train", 10, 0),
        "valid": write_bigram_corpus(folder / "valid", 10, 1),
    }


def epochs_config(corpora: dict[str, str], epochs: float, **train: Any) -> Config:
    return config_for(Path("run"), corpora, train={"steps": 400, "epochs": epochs, **train})


@pytest.mark.parametrize("ramp", [None, BatchRampConfig(start=2, increment=2, steps=5)])
@pytest.mark.parametrize("epochs", [0.1, 1.0, 2.5, 300.0])
def test_steps_are_the_fewest_that_hold_the_epochs(
    corpora: dict[str, str], epochs: float, ramp: BatchRampConfig | None
) -> None:
    manifest = load_manifest(corpora["train"])
    per_epoch = -(-(manifest.tokens + manifest.documents) // LENGTH)
    rows = Fraction(str(epochs)) * per_epoch
    config = epochs_config(corpora, epochs, batch_ramp=ramp)
    if ramp is not None and rows < rows_before(config, ramp.steps - 1):
        with pytest.raises(ValueError, match=r"train\.epochs 0\.1 of 32 rows: train\.batch_ramp\.steps 5 is more than"):
            count_steps(config)
        return
    counted = count_steps(config)
    steps = counted.train.steps
    assert counted.train.epochs is None and count_steps(counted) is counted
    assert rows_before(config, steps - 1) < rows <= rows_before(config, steps)
    if ramp is None:
        assert steps == -(-rows // 8)


def test_tenths_are_exact(corpora: dict[str, str]) -> None:
    # 0.1 * 30 is above 3 in floating point, and would give a step more.
    manifest = load_manifest(corpora["train"])
    rows = -(-(manifest.tokens + manifest.documents) // LENGTH)
    assert count_steps(epochs_config(corpora, 5 / rows, global_batch_size=1, micro_batch_size=1)).train.steps in (5, 6)
    assert count_steps(epochs_config(corpora, 1.1, global_batch_size=1, micro_batch_size=1)).train.steps == -(
        -11 * rows // 10
    )


def test_only_one_of_steps_and_epochs(corpora: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^config: both train\.steps and train\.epochs are given; set one of them"):
        config_from_mapping({"train": {"steps": 5}}, ["train.epochs=2"])
    config = config_from_mapping({"train": {"steps": 5, "epochs": 2}}, ["train.epochs=null"])
    assert (config.train.steps, config.train.epochs) == (5, None)
    asked = epochs_config(corpora, 2)
    (tmp_path / "config.yaml").write_text(to_yaml(asked))
    assert load_config(tmp_path / "config.yaml").train.epochs == 2 and "steps" not in as_dict(asked)["train"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": None}, r"train\.epochs counts passes over data\.train, which is not set"),
        ({"train": [CorpusConfig("a", 1.0), CorpusConfig("b", 1.0)]}, r"one corpus, and data\.train mixes several"),
    ],
)
def test_epochs_need_one_corpus(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        count_steps(variant(data=data, train={"epochs": 1.0}))
    assert "\n" not in str(caught.value)


def test_contradictions_are_found_before_the_start(corpora: dict[str, str], tmp_path: Path) -> None:
    config = replace(
        epochs_config(corpora, 1, batch_ramp=BatchRampConfig(start=2, increment=2, steps=50)),
        run_dir=str(tmp_path / "run"),
    )
    with pytest.raises(ValueError, match=r"train\.batch_ramp\.steps 50 is more than train\.steps") as caught:
        check_config(config, 1)
    assert "\n" not in str(caught.value)


def test_a_dry_run_shows_the_steps(corpora: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(epochs_config(corpora, 2)))
    assert main(["train", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "epochs: null" in out and re.search(r"^  steps +8$", out, re.MULTILINE)
    assert main(["train", str(tmp_path / "run.yaml"), "--dry-run", "data.train=null"]) == 2
    assert "train.epochs counts passes over data.train, which is not set" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_of_epochs_resumes_to_the_bit(tmp_path: Path, corpora: dict[str, str]) -> None:
    keys = {"train": {"epochs": 1.5}}
    run_ranks(pretrain, 1, config_for(tmp_path / "whole", corpora, **keys))
    assert len(metrics(tmp_path / "whole")) == 6
    parts = config_for(tmp_path / "parts", corpora, checkpoint={"every_steps": 3}, **keys)
    run_ranks(pretrain_and_die_after, 1, parts, 4, timeout=60)
    # What it left tells its steps without the corpus.
    kept = load_config(tmp_path / "parts" / "config.yaml")
    assert (kept.train.steps, kept.train.epochs) == (6, None)
    run_ranks(pretrain, 1, parts)
    assert without_times(metrics(tmp_path / "parts")) == without_times(metrics(tmp_path / "whole"))
    loaded = [json.loads(line) for line in (tmp_path / "parts" / "events.jsonl").read_text().splitlines()]
    assert next(event for event in loaded if event["event"] == "loaded")["changed"] == {}

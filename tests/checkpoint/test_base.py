"""A run with adapters needs its base, to go on and to be looked at: the right one, or one line that says so."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_md.checkpoint.base import open_base, recorded_base
from megatron_md.checkpoint.directory import checkpoint_name, find_checkpoint
from megatron_md.checkpoint.integrity import weights_digest
from megatron_md.config import ConfigError, LoraConfig
from megatron_md.run.check import check_config
from tests.adapted_run import KEYS, TENSOR2, adapted_config, train_adapters, write_base
from tests.checkpoint.hf.test_convert import convert
from tests.checkpoint.hf.test_peft import reloaded
from tests.checkpoint.hf_models import shape_of, write_model
from tests.ranks import run_ranks
from tests.small_run import VOCAB
from tests.train.test_trainer import metrics, pretrain, without_times


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    train_adapters(folder)
    write_model(folder / "other_hf", "llada", shape_of("llada", vocab=VOCAB), std=0.06)
    convert(folder / "other_hf", folder / "other", "llada")
    return folder


def refusals(config: Any, world: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check_config(config, world)
    return error.value.lines


def test_the_same_weights_have_one_digest_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    convert(folder / "hf", tmp_path / "again", "llada")
    digests = {weights_digest(find_checkpoint(run)) for run in (folder / "base", tmp_path / "again")}
    assert len(digests) == 1
    assert digests != {weights_digest(find_checkpoint(folder / "other"))}


def test_a_checkpoint_of_adapters_holds_nothing_else_and_names_its_base(folder: Path) -> None:
    from megatron_md.checkpoint.safe_pickle import guarded
    from megatron_md.checkpoint.storage import TensorReader

    checkpoint = find_checkpoint(folder / "lora")
    with guarded(checkpoint):
        names = set(TensorReader(checkpoint).tensors)
    assert all(".lora_" in name for name in names)
    weights = {name for name in names if not name.startswith("optimizer.")}
    assert len(weights) == 2 * 7 and len(names) == 3 * len(weights)
    base = recorded_base(checkpoint)
    assert base is not None and base == open_base(folder / "base")
    assert recorded_base(base.path) is None


def test_a_run_and_its_base_can_be_moved_together(folder: Path, tmp_path: Path) -> None:
    for name in ("base", "lora"):
        shutil.copytree(folder / name, tmp_path / "moved" / name)
    checkpoint = find_checkpoint(tmp_path / "moved" / "lora")
    record = json.loads((checkpoint / "progress.json").read_text())
    record["base"]["path"] = str(tmp_path / "nowhere")
    (checkpoint / "progress.json").write_text(json.dumps(record))
    base = recorded_base(checkpoint)
    assert base is not None and os.path.samefile(base.path, find_checkpoint(tmp_path / "moved" / "base"))


def test_a_base_that_is_gone_or_another_one_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "lora", tmp_path / "lora")
    checkpoint = find_checkpoint(tmp_path / "lora")
    record = json.loads((checkpoint / "progress.json").read_text())
    for path, expected in (
        (tmp_path / "gone", "put that checkpoint back"),
        (find_checkpoint(folder / "other"), "sha256"),
    ):
        record["base"] |= {"path": str(path), "relative": "nowhere"}
        (checkpoint / "progress.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match=re.escape(expected)) as error:
            recorded_base(checkpoint)
        assert "\n" not in str(error.value)


def test_training_on_another_base_is_refused_before_anything_is_built(folder: Path) -> None:
    check_config(adapted_config(folder), 1)
    (line,) = refusals(adapted_config(folder, checkpoint={"load": str(folder / "other")}))
    assert "are not those that the adapters of" in line and "choose another run_dir" in line
    check_config(adapted_config(folder, "new", checkpoint={"load": str(folder / "other")}), 1)
    (line,) = refusals(adapted_config(folder, "new", checkpoint={"load": str(folder / "lora")}))
    assert "holds adapters only; merge them with their weights first" in line
    full = replace(adapted_config(folder, "new", checkpoint={"load": str(folder / "lora")}), lora=None)
    assert refusals(full) == [line]
    (line,) = refusals(adapted_config(folder, "new", replace(KEYS, load=str(folder))))
    assert line.startswith("lora.load: ") and "adapter_model" in line
    (line,) = refusals(adapted_config(folder, checkpoint={"load": None, "load_only": None}))
    assert line.startswith("lora trains adapters on the weights of another run")


@pytest.mark.distributed
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_resuming_equals_a_run_that_was_never_stopped(dropout: float, folder: Path) -> None:
    name = f"resumed_{dropout}"
    if dropout:
        keys = replace(KEYS, dropout=dropout)
        assert run_ranks(pretrain, 2, adapted_config(folder, name, keys, parallel=TENSOR2)) == [0, 0]
        config = adapted_config(folder, name, keys, parallel=TENSOR2)
    else:
        shutil.copytree(folder / "lora", folder / name)
        config = adapted_config(folder, name, parallel=TENSOR2)
    run = folder / name
    whole, newest = metrics(run), find_checkpoint(run)
    assert newest.name == checkpoint_name(4)
    expected = run_ranks(reloaded, 1, adapted_config(folder, name, config.lora or KEYS), None)[0]
    shutil.rmtree(newest)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole[:2]))
    assert run_ranks(pretrain, 2, config) == [0, 0]
    assert without_times(metrics(run)) == without_times(whole)
    assert torch.equal(run_ranks(reloaded, 1, adapted_config(folder, name, config.lora or KEYS), None)[0], expected)


@pytest.mark.distributed
def test_other_adapters_are_no_resume(folder: Path) -> None:
    config = adapted_config(folder, keys=LoraConfig(rank=2, alpha=12.0), train={"steps": 6})
    (message,) = run_ranks(refused, 1, config)
    assert "belongs to another run (lora: " in message and "'rank': 2" in message


def refused(config: Any) -> str:
    with pytest.raises(ValueError) as error:
        pretrain(config)
    return str(error.value)

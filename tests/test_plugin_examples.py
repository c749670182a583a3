"""The examples of a callback and of a family of checkpoints of one's own, plugged in as the documentation says."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import megatron_md as md
from megatron_md.checkpoint.hf.families import FAMILIES
from megatron_md.errors import UserError
from tests.checkpoint.hf_models import contents, shape_of, write_model
from tests.ranks import run_ranks
from tests.train.test_trainer import config_for, metrics, write_bigram_corpus

FOLDER = Path(__file__).parent.parent / "examples" / "plugin"


def pretrain_with_examples(config: Any) -> int:
    """On a rank: train with the folder of the examples on the path."""
    sys.path.insert(0, str(FOLDER))
    from megatron_md.run.pretrain import pretrain

    return pretrain(config)


@pytest.mark.distributed
def test_a_callback_adds_to_the_records_of_runs_that_import_it(tmp_path: Path) -> None:
    corpora = {name: write_bigram_corpus(tmp_path / name, 20, seed) for seed, name in enumerate(("train", "valid"))}
    plain = config_for(tmp_path / "plain", corpora, train={"steps": 4})
    own = replace(config_for(tmp_path / "own", corpora, train={"steps": 4}), imports=("smooth_loss",))
    run_ranks(pretrain_with_both, 1, own, plain)
    losses = [record["loss"] for record in metrics(tmp_path / "own")]
    average = losses[0]
    for record in metrics(tmp_path / "own"):
        average = 0.9 * average + 0.1 * record["loss"]
        assert record["loss_smooth"] == pytest.approx(average)
    records = metrics(tmp_path / "plain")
    assert [record["loss"] for record in records] == losses and "loss_smooth" not in records[0]


def pretrain_with_both(own: Any, plain: Any) -> None:
    """On a rank: one run that imports the callback, then one that does not, in the same process."""
    assert pretrain_with_examples(own) == pretrain_with_examples(plain) == 0


@pytest.fixture
def mistral(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.reload(importlib.import_module("mistral"))
    del FAMILIES["mistral"]


def test_a_family_goes_in_and_comes_out_the_same_to_the_byte(mistral: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "mistral", shape_of("llama"))
    md.convert(tmp_path / "hf", tmp_path / "run", family="mistral", to="megatron")
    md.convert(tmp_path / "run", tmp_path / "back", family="mistral", to="hf")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    with pytest.raises(UserError, match="sliding_window is 4096"):
        mistral.read_mistral({**config, "sliding_window": 4096})


def test_transformers_opens_the_family(mistral: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tensors = write_model(tmp_path / "hf", "mistral", shape_of("llama"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "MistralForCausalLM" and model.config.sliding_window is None
    assert model.num_parameters() == sum(tensor.numel() for tensor in tensors.values())

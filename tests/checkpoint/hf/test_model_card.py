"""The card of an export: true metadata, what the run says of the model, no path of this machine, no foreign markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_md.checkpoint.directory import Weights
from megatron_md.checkpoint.hf.families import FAMILIES
from megatron_md.checkpoint.hf.model_card import model_card
from megatron_md.config import config_from_mapping, resolve
from tests.checkpoint.hf.test_convert import convert, export
from tests.checkpoint.hf_models import contents, shape_of, write_model

CONFIG: dict[str, Any] = {
    "run_dir": "/home/alice/runs/books",
    "model": {"preset": "tiny", "vocab": 300},
    "data": {"train": "/home/alice/corpus/novels/manifest.json", "valid": "/home/alice/corpus/valid"},
    "objective": {"mask_schedule": "window-uniform"},
    "checkpoint": {"load": "/home/alice/runs/llada-8b", "load_only": "model"},
    "validation": {"sequences": 64},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What of a trained checkpoint the card reads."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_00000400"
    checkpoint.mkdir(parents=True)
    progress = {"step": 400, "next_sample_index": 3200, "tokens": 204_800, "total_tokens": 204_800}
    record = {"format": 2, "progress": progress, "layout": {}, "optimizer": ["ema"], "identity": {}, "val_nelbo": 4.9}
    (checkpoint / "progress.json").write_text(json.dumps(record))
    records = [
        {"step": 300, "val_nelbo": 5.0, "val_nelbo_stderr": 0.5},
        {"step": 400, "val_nelbo": 4.9, "val_nelbo_stderr": 0.25},
        {"step": 500, "val_nelbo": 4.0, "val_nelbo_stderr": 0.125},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return checkpoint


def card_of(
    checkpoint: Path, hf_config: str | None = "{}", family: str = "llama", weights: Weights = "model", **sections: Any
) -> str:
    config = resolve(config_from_mapping({**CONFIG, **sections}))
    content = None if hf_config is None else hf_config.encode()
    return model_card(checkpoint, config, FAMILIES[family], weights, hf_config=content).decode()


def test_a_card_tells_what_the_run_tells_and_no_path(checkpoint: Path) -> None:
    card = card_of(checkpoint)
    for expected in (
        "# books\n", "A masked-diffusion language model", "on the weights of `llada-8b`", "`window-uniform`",
        "204,800, in 400 steps", "| data | `novels` |", "4.9000 ± 0.2500 nats per token, on `valid`, at step 400",
        "from transformers import AutoModelForCausalLM", "has causal attention, which this model was not trained with",
        "--family llama --to megatron", "Not stated yet",
    ):  # fmt: skip
        assert expected in card, expected
    assert "alice" not in card and str(checkpoint.parent) not in card


def test_its_metadata_are_hugging_face_s_and_leave_the_licence_open(checkpoint: Path) -> None:
    header = yaml.safe_load(card_of(checkpoint).split("---\n")[1])
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatron-md", "masked-diffusion"],
    }
    assert yaml.safe_load(card_of(checkpoint, None).split("---\n")[1])["library_name"] == "peft"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"hf_config": '{"auto_map": {"AutoModel": "x"}}', "family": "llada"}, "AutoModel.from_pretrained("),
        ({"hf_config": '{"auto_map": {"AutoModel": "x"}}', "family": "llada"}, "trust_remote_code=True"),
        ({"hf_config": None, "lora": {"rank": 4, "alpha": 8.0}}, "| adapters | rank 4, alpha 8 |"),
        ({"weights": "ema", "train": {"ema_decay": 0.99}}, "their average, decay 0.99"),
        ({"objective": {"name": "autoregressive"}}, "An autoregressive language model"),
        ({"objective": {"name": "autoregressive"}}, "megatron-md generate runs/it"),
        ({"hf_config": "{}", "family": "llada"}, "megatron-md generate runs/it"),
        ({}, "set `objective` as above to train from it"),
        ({"objective": {"name": "block_diffusion", "block_size": 32}}, "| block size | 32 |"),
        ({"objective": {"mask_schedule": "knots:/home/alice/points"}}, "`knots:points`"),
        (
            {"objective": {"mask_schedule": {"name": "knots", "file": "/home/alice/points"}}},
            '`{"name": "knots", "file": "points"}`',
        ),
        ({"data": {"train": [{"manifest": "s3://b/x?key=1", "weight": 1.0}], "valid": None}}, "| data | `x` |"),
    ],
)
def test_what_differs_is_told(keys: dict[str, Any], expected: str, checkpoint: Path) -> None:
    card = card_of(checkpoint, **keys)
    assert expected in card and "alice" not in card and "key=1" not in card


def test_foreign_names_are_no_markup(checkpoint: Path) -> None:
    evil = "`<script>|\x1b[2J\n# no heading"
    card = card_of(checkpoint, run_dir=f"runs/<script>{evil}", data={"train": [{"manifest": evil, "weight": 1.0}]})
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", card, flags=re.DOTALL)
    assert "<script>" not in outside and "\x1b" not in card and "\n# no heading" not in card


def test_a_run_without_validation_and_steps(checkpoint: Path) -> None:
    (checkpoint.parent.parent / "metrics.jsonl").unlink()
    record = json.loads((checkpoint / "progress.json").read_text())
    record["progress"] |= {"step": 0, "tokens": 0}
    (checkpoint / "progress.json").write_text(json.dumps({**record, "val_nelbo": None}))
    card = card_of(checkpoint)
    assert "No validation is recorded." in card and "none by the run itself" in card


def test_every_export_has_a_card_and_the_owner_s_own_stays_as_it_is(tmp_path: Path) -> None:
    hf, run, back, again = (tmp_path / name for name in ("hf", "run", "back", "again"))
    write_model(hf, "llada", shape_of("llada"))
    (hf / "README.md").write_text("the card of the source, which a trained model is not")
    convert(hf, run, "llada")
    export(run, back, "llada")
    assert contents(back) == contents(hf)
    assert "Written by `megatron-md convert`" in (back / "README.md").read_text()
    (run / "huggingface" / "README.md").write_text("mine")
    export(run, again, "llada")
    assert (again / "README.md").read_text() == "mine"

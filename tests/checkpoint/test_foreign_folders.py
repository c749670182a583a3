"""Folders of Hugging Face that somebody else has written or damaged: one clear line or correct data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_md.checkpoint.hf.convert import open_import
from megatron_md.checkpoint.hf.families import FAMILIES
from megatron_md.checkpoint.hf.folder import INDEX_NAME, SINGLE_NAME
from megatron_md.checkpoint.hf.original import _read
from tests.checkpoint.hf_models import FAMILY_NAMES, shape_of, write_model, write_tokenizer
from tests.hostile import changed_bytes, changed_json, profiles, refused, tried

pytest.importorskip("safetensors")


def imported(folder: Path, family: str, *, add_mask_token: bool = False) -> None:
    with open_import(folder, FAMILIES[family], add_mask_token=add_mask_token) as plan:
        pass
    assert plan.model.layers == 4 and plan.model.hidden == 32 and plan.model.norm_eps > 0.0


@profiles
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_config_json(family: str, profile: str, tmp_path: Path) -> None:
    write_model(tmp_path / "hf", family, shape_of(family))
    path = tmp_path / "hf" / "config.json"
    tried((changed_json(json.loads(path.read_bytes())), path, lambda: imported(tmp_path / "hf", family)), profile)


FIT = [("rms_norm_eps", value) for value in ("1e300", "4.0", "99999999999999999999")]


@pytest.mark.parametrize(
    "value", ["NaN", "1e300", "-1", "0", "true", '"4"', "[4]", "{}", "4.0", "99999999999999999999"]
)
@pytest.mark.parametrize("key", ["n_layers", "n_heads", "d_model", "embedding_size", "rms_norm_eps"])
def test_sizes_that_are_none(key: str, value: str, tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llada", shape_of("llada"))
    path = tmp_path / "hf" / "config.json"
    content = {**json.loads(path.read_bytes()), key: "HERE"}
    path.write_text(json.dumps(content).replace('"HERE"', value))
    said = refused(lambda: imported(tmp_path / "hf", "llada"))
    assert (said is None) == ((key, value) in FIT)
    assert said is None or (f"{path}: " in said and "\n" not in said)


@profiles
@pytest.mark.parametrize("name", [INDEX_NAME, "weights", "tokenizer.json"])
def test_other_files_of_a_folder(name: str, profile: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    write_model(folder, "llama", shape_of("llama"), shard_bytes=20_000 if name == INDEX_NAME else 1 << 20)
    write_tokenizer(folder)
    path = folder / (SINGLE_NAME if name == "weights" else name)
    sound = path.read_bytes()
    if name == "weights":
        files = changed_bytes(sound[:4096]).map(lambda head: head + sound[4096:])
    else:
        files = changed_json(json.loads(sound))
    tried((files, path, lambda: imported(folder, "llama", add_mask_token=name == "tokenizer.json")), profile)


@profiles
def test_what_a_run_keeps_of_a_folder(profile: str, tmp_path: Path) -> None:
    sound = {"family": "llama", "shards": {"model.safetensors": ["a", "b"]}}
    (tmp_path / "config.json").write_text("{}")
    tried((changed_json(sound), tmp_path / "source.json", lambda: _read(tmp_path)), profile)

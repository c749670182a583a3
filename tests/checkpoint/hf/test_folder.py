"""What is wrong with a folder is said by name, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_md.checkpoint.hf.convert import open_import
from megatron_md.checkpoint.hf.families import FAMILIES
from megatron_md.checkpoint.hf.folder import INDEX_NAME, SINGLE_NAME, FolderError, HuggingFaceFolder, plan_shards
from megatron_md.errors import UserError
from tests.checkpoint.hf_models import shape_of, write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "hf", "llama", shape_of("llama"))
    return tmp_path / "hf"


def refusal(folder: Path, family: str = "llama", **keys: Any) -> str:
    with pytest.raises(UserError) as error, open_import(folder, FAMILIES[family], **keys):
        pass
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def rewrite(folder: Path, change: object) -> None:
    """Give one weight file other tensors."""
    from safetensors.torch import load_file, save_file

    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path)
    index = json.loads((folder / INDEX_NAME).read_text())
    places = {name: file for name, file in index["weight_map"].items() if file != path.name}
    index["weight_map"] = places | dict.fromkeys(tensors, path.name)
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_missing_extra_and_misshapen_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    for change, text in (
        (lambda tensors: tensors.pop("model.embed_tokens.weight"), r"missing: model.embed_tokens.weight"),
        (lambda tensors: tensors.update(stranger=torch.ones(2)), "unknown: stranger"),
        (
            lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(66, 32)}),
            "model.embed_tokens.weight has shape [66, 32], and config.json says [67, 32]",
        ),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        rewrite(copy, change)
        assert text in refusal(copy)
        shutil.rmtree(copy)


def test_another_family_and_unsupported_configs_are_refused(folder: Path, tmp_path: Path) -> None:
    wrong = "config.json: not a {0} model that is supported: model_type is 'llama'; only {1!r} is supported"
    for family, model_type in (
        ("llada", "llada"),
        ("dream", "Dream"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("sdar", "sdar"),
    ):
        assert wrong.format(family, model_type) in refusal(folder, family)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["model_type"]
    path.write_text(json.dumps(config))
    assert "config.json: not a llada model that is supported: n_heads is missing" in refusal(folder, "llada")
    assert "missing: model.layers.0.self_attn.q_proj.bias" in refusal(folder, "qwen2")
    for key, value, text in (
        ("hidden_act", "gelu", "hidden_act is 'gelu'; only 'silu' is supported"),
        ("rope_scaling", {"rope_type": "llama3"}, "rotary positions are scaled ('llama3')"),
        ("attention_bias", True, "attention_bias is True"),
    ):
        path.write_text(json.dumps({**config, key: value}))
        assert text in refusal(folder)
    path.write_text("[]")
    assert "not a JSON object" in refusal(folder)
    path.write_text("{")
    assert "config.json: malformed JSON" in refusal(folder)
    path.unlink()
    assert "config.json: cannot be read" in refusal(folder)
    with pytest.raises(FolderError, match="no such folder"):
        HuggingFaceFolder(tmp_path / "nowhere")


def test_a_block_size_is_known_and_fits(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "sdar", shape_of("sdar"))
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    for value, asked, text in (
        (4, 8, "block_size is 4, and --block-size 8; leave that out, or correct the file"),
        (None, None, "block_size is missing; say by --block-size what the model was trained with"),
        (None, 65, "block_size is 65; only whole numbers from 1 to 64"),
        (0, None, "block_size is 0; only whole numbers"),
        ("4", None, "block_size is '4'; only whole numbers"),
    ):
        path.write_text(json.dumps({**config, "block_size": value}))
        said = refusal(path.parent, "sdar", block_size=asked)
        assert text in said and str(path) in said


def test_pickles_half_written_files_and_foreign_paths_are_refused(folder: Path, tmp_path: Path) -> None:
    first, *others = sorted(folder.glob("*.safetensors"))
    data = first.read_bytes()
    first.write_bytes(data[:-7])
    assert f"{first}: not a whole safetensors file" in refusal(folder)
    first.unlink()
    assert f"{first}: missing, though {INDEX_NAME} lists it" in refusal(folder)
    index = json.loads((folder / INDEX_NAME).read_text())
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "'../secret.safetensors' is not a file of the folder" in refusal(folder)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": index["metadata"]}))
    assert "has no weight_map" in refusal(folder)
    for path in (folder / INDEX_NAME, *others):
        path.unlink()
    assert f"holds neither {SINGLE_NAME} nor {INDEX_NAME}" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "weights in a pickle can run code" in refusal(folder)


def test_shards_hold_what_fits() -> None:
    assert plan_shards({"a": 5, "b": 5}, 10) == {SINGLE_NAME: ["a", "b"]}
    assert list(plan_shards({"a": 5, "b": 6, "c": 40, "d": 1}, 10).values()) == [["a"], ["b"], ["c"], ["d"]]

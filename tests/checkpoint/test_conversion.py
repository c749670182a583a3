"""Folders go in, are loaded and saved on other layouts, and come out the same to the byte."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_md.checkpoint.conversion import import_folder, open_export, plan_import
from megatron_md.checkpoint.directory import checkpoint_name, latest_checkpoint
from megatron_md.checkpoint.families import FAMILIES
from megatron_md.checkpoint.hf_folder import HuggingFaceFolder
from megatron_md.config import load_config
from tests.checkpoint.hf_models import FAMILY_NAMES, contents, shape_of, write_model
from tests.ranks import run_ranks


def convert(source: Path, target: Path, family: str, **keys: Any) -> None:
    with HuggingFaceFolder(source) as folder:
        import_folder(folder, plan_import(folder, FAMILIES[family], **keys), FAMILIES[family], target)


def export(source: Path, target: Path, family: str, **keys: Any) -> None:
    with open_export(source, FAMILIES[family], **keys) as ready:
        ready.write(target)


@pytest.mark.parametrize(
    ("family", "keys"),
    [(name, {}) for name in FAMILY_NAMES]
    + [("llama", {"tied": True}), ("qwen2", {"kv_heads": 4, "tied": True}), ("llada", {"kv_heads": 4})],
)
def test_folders_come_back_the_same_to_the_byte(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    write_model(tmp_path / "hf", family, shape_of(family, **keys))
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    convert(tmp_path / "hf", tmp_path / "run", family)
    export(tmp_path / "run", tmp_path / "back", family)
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


def resave(run_dir: Path, layout: dict[str, Any]) -> None:
    """On each rank: load the weights and save them on this layout, at step 1."""
    from megatron_md.checkpoint.manager import CheckpointManager
    from megatron_md.train.progress import Progress
    from tests.small_run import small_run

    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    text = (checkpoint / "config.yaml").read_text()
    config = load_config(checkpoint / "config.yaml", [f"parallel.{key}={value}" for key, value in layout.items()])
    config = replace(config, objective=replace(config.objective, name="masked_diffusion"))
    with small_run(config) as run:
        manager = CheckpointManager(run_dir, keep_last=2, resolved_config=text)
        manager.load_model_only(run.chunks, run.optimizer, checkpoint)
        manager.save(run.chunks, run.optimizer, Progress(1, 8, 256, 10_000))


LAYOUTS: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("llama", 2, {"tensor": 2}, {"kv_heads": 2}),
    ("qwen2", 2, {"pipeline": 2}, {"tied": True}),
    ("qwen3", 4, {"tensor": 2, "pipeline": 2}, {}),
    ("llada", 4, {"tensor": 4}, {"kv_heads": 4}),
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "size", "layout", "keys"),
    [LAYOUTS[2], *(pytest.param(*case, marks=pytest.mark.slow) for case in (*LAYOUTS[:2], LAYOUTS[3]))],
)
def test_weights_survive_other_layouts(
    family: str, size: int, layout: dict[str, Any], keys: dict[str, Any], tmp_path: Path
) -> None:
    write_model(tmp_path / "hf", family, shape_of(family, **keys))
    convert(tmp_path / "hf", tmp_path / "run", family)
    run_ranks(resave, size, tmp_path / "run", layout)
    assert latest_checkpoint(tmp_path / "run").name == checkpoint_name(1)  # type: ignore[union-attr]
    export(tmp_path / "run", tmp_path / "back", family)
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


def test_a_data_type_can_be_chosen(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "hf", "llama", shape_of("llama"))
    convert(tmp_path / "hf", tmp_path / "run", "llama", dtype=torch.bfloat16)
    export(tmp_path / "run", tmp_path / "back", "llama")
    with HuggingFaceFolder(tmp_path / "back") as folder:
        for name, tensor in tensors.items():
            assert torch.equal(folder.read(name), tensor.to(torch.bfloat16)), name


def test_bf16_weights_stay_as_they_are(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llada", shape_of("llada"), dtype=torch.bfloat16)
    convert(tmp_path / "hf", tmp_path / "run", "llada")
    export(tmp_path / "run", tmp_path / "back", "llada")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {text: number for number, text in enumerate(["<unk>", *"abcdefgh", "ab", "cd"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("c", "d")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


@pytest.mark.parametrize("vocab", [12, 20])
def test_a_mask_token_joins_tokenizer_and_weights(vocab: int, tmp_path: Path) -> None:
    from megatron_md.data.tokenizer import Tokenizer

    tensors = write_model(tmp_path / "hf", "llama", shape_of("llama", vocab=vocab))
    write_tokenizer(tmp_path / "hf")  # 12 tokens
    convert(tmp_path / "hf", tmp_path / "run", "llama", add_mask_token=True)
    tokenizer = Tokenizer(tmp_path / "run" / "tokenizer.model")
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (12, 11)
    assert tokenizer.decode(tokenizer.encode("abcd h")) == Tokenizer(
        tmp_path / "run" / "huggingface" / "tokenizer.json"
    ).decode([9, 10, 8])
    export(tmp_path / "run", tmp_path / "back", "llama")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["mask_token_id"] == 12 and config["vocab_size"] == max(vocab, 13)
    assert Tokenizer(tmp_path / "back" / "tokenizer.json").mask_token_id == 12
    with HuggingFaceFolder(tmp_path / "back") as folder:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = folder.read(name)
            assert torch.equal(rows[:vocab], tensors[name])
            if vocab == 12:
                torch.testing.assert_close(rows[12], tensors[name].mean(dim=0))


def test_a_run_of_ours_becomes_llada_and_llama(tmp_path: Path) -> None:
    run_ranks(save_own, 1, tmp_path / "run")
    for family in ("llada", "llama"):
        export(tmp_path / "run", tmp_path / family, family)
        assert "auto_map" in json.loads((tmp_path / family / "config.json").read_text()) or family == "llama"
        convert(tmp_path / family, tmp_path / f"again_{family}", family)
        export(tmp_path / f"again_{family}", tmp_path / f"{family}_2", family)
        assert contents(tmp_path / f"{family}_2") == contents(tmp_path / family)
    with pytest.raises(
        ValueError, match=r"model\.qk_norm is False, which qwen3 cannot express; export as llada or llama"
    ):
        export(tmp_path / "run", tmp_path / "qwen3", "qwen3")
    assert not (tmp_path / "qwen3").exists()


def save_own(run_dir: Path) -> None:
    """A checkpoint of a small run of this framework."""
    from tests.checkpoint.saved import save_checkpoint

    save_checkpoint(run_dir)


def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "hf", "llama", shape_of("llama"))
    convert(tmp_path / "hf", tmp_path / "run", "llama")
    for target, call in (("run2", convert), ("back", export)):
        with monkeypatch.context() as patch:
            patch.setattr("torch.save", _disk_full)
            patch.setattr("safetensors.torch.save_file", _disk_full)
            source = tmp_path / ("hf" if target == "run2" else "run")
            with pytest.raises(ValueError, match=r"cannot be written .*No space left"):
                call(source, tmp_path / target, "llama")
        assert not (tmp_path / target).exists()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".writing")]


def _disk_full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")

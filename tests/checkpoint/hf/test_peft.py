"""LLaDA folder, adapters on two ranks, and out again: merged in the published layout, or as PEFT's own folder."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_md.checkpoint.hf.families import FAMILIES
from megatron_md.checkpoint.hf.folder import HuggingFaceFolder
from megatron_md.checkpoint.hf.peft_config import check_folder
from megatron_md.config import LoraConfig, ResolvedConfig
from tests.adapted_run import KEYS, adapted_config, train_adapters, write_base
from tests.checkpoint.hf.test_convert import export
from tests.checkpoint.hf.test_verify import lines, relative
from tests.checkpoint.hf_models import contents
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_base(folder)
    train_adapters(folder)
    for family in ("llada", "llama"):
        to_peft(folder / "lora", folder / f"peft_{family}", family)
        card = (folder / f"peft_{family}" / "README.md").read_text()
        assert "library_name: peft" in card and "Adapters of a masked-diffusion" in card and str(folder) not in card
    return folder


def to_peft(run: Path, target: Path, family: str) -> None:
    from megatron_md.checkpoint.hf.convert import convert

    convert(run, target, family=family, to="peft", tell=lambda line: None)


def test_a_merged_export_has_the_layout_of_its_base_and_the_logits_of_the_run(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    export(folder / "lora", tmp_path / "merged", "llada")
    assert contents(tmp_path / "merged").keys() == contents(folder / "hf").keys()
    assert (tmp_path / "merged" / "config.json").read_bytes() == (folder / "hf" / "config.json").read_bytes()
    with HuggingFaceFolder(tmp_path / "merged") as merged, HuggingFaceFolder(folder / "hf") as base:
        assert merged.shards() == base.shards()
        changed = {name for name in base.tensors if not torch.equal(merged.read(name), base.read(name))}
    assert changed == {name for name in base.tensors if re.search(r"blocks\.\d+\.(?!attn_norm|ff_norm)", name)}
    (report,) = run_ranks(lines, 1, tmp_path / "merged", folder / "lora", "llada")
    assert all(relative(line) <= 2e-5 for line in report if line.startswith("fp32")), report
    (report,) = run_ranks(lines, 1, folder / "hf", folder / "lora", "llada")
    assert all(relative(line) > 1e-2 for line in report if line.startswith("fp32")), report


def test_peft_opens_an_export_and_gives_the_same_logits(folder: Path, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    export(folder / "base", tmp_path / "base", "llama")
    export(folder / "lora", tmp_path / "merged", "llama")
    plain, merged = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("base", "merged")
    )
    model = peft.PeftModel.from_pretrained(plain, folder / "peft_llama").eval()
    tokens_BL = torch.arange(4, 52).reshape(2, 24)
    with torch.no_grad():
        ours, theirs = merged(tokens_BL).logits, model(tokens_BL).logits
        with model.disable_adapter():
            without = model(tokens_BL).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6 * ours.abs().max().item())
    assert (without - ours).abs().max() > 1e-2 * ours.abs().max()


@pytest.mark.parametrize("family", ["llada", "llama"])
def test_an_export_names_the_modules_of_its_family(family: str, folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    content = json.loads((folder / f"peft_{family}" / "adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"], content["lora_dropout"]) == (4, 12, 0.0)
    stored = safetensors.load_file(folder / f"peft_{family}" / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in stored}
    rules = FAMILIES[family].rules
    matrices = {
        name for rule in rules if rule.is_layer for name in rule.theirs if rule.shapes[0][1:] and "bias" not in name
    }
    assert names == {name.removesuffix(".weight").format(layer=layer) for name in matrices for layer in range(4)}
    # As PEFT chooses modules: all of these, and neither norms, embedding nor head.
    every = {name.removesuffix(".weight").format(layer=2) for rule in rules for name in rule.theirs}
    target = content["target_modules"]
    if isinstance(target, str):
        chosen = {name for name in every if re.fullmatch(target, name)}
    else:
        chosen = {name for name in every if name.rpartition(".")[2] in target}
    assert chosen == {name for name in names if ".2." in name}


def reloaded(config: ResolvedConfig, peft: str | None) -> torch.Tensor:
    """On a rank: the logits of a run's newest checkpoint, or of its base with the adapters of a PEFT folder."""
    from megatron_md import parallel
    from megatron_md.checkpoint import state
    from megatron_md.checkpoint.base import open_base
    from megatron_md.checkpoint.directory import find_checkpoint
    from megatron_md.checkpoint.hf.peft import load_adapters
    from megatron_md.model.build import build_model
    from megatron_md.model.initialize import sharded_tensors
    from megatron_md.train.inference import Inference

    with parallel.session(config) as world:
        chunks: list[Any] = build_model(config, world.device, causal=False, mask_token_id=3, initialize=False)
        base = open_base(Path(str(config.checkpoint.load))).path
        if peft is None:
            state.load_model(chunks, find_checkpoint(Path(config.run_dir)), base)
        else:
            state.load_base(chunks, base)
            load_adapters(sharded_tensors(state.model_state(chunks)), Path(peft), config)
        return Inference(config, world, chunks, causal=False, mask_token_id=3)(torch.arange(4, 36).reshape(2, 16))


@pytest.mark.slow
@pytest.mark.distributed
def test_an_export_comes_back_on_another_layout(folder: Path) -> None:
    (expected,) = run_ranks(reloaded, 1, adapted_config(folder), None)
    for family in ("llada", "llama"):
        (found,) = run_ranks(reloaded, 1, adapted_config(folder), str(folder / f"peft_{family}"))
        assert torch.equal(found, expected)
    two = run_ranks(reloaded, 2, adapted_config(folder, parallel={"tensor": 2}), str(folder / "peft_llada"))
    for found in two:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"r": 8}, "r is 8, and lora.rank 4: set lora.rank=8"),
        ({"lora_alpha": 3}, "lora_alpha is 3, and lora.alpha 12: set lora.alpha=3"),
        ({"use_dora": True}, "use_dora is set"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ],
)
def test_adapters_of_another_kind_are_refused(
    content: dict[str, Any], expected: str, folder: Path, tmp_path: Path
) -> None:
    own = folder / "peft_llada"
    check_folder(own, KEYS)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    own_content = json.loads((own / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**own_content, **content}))
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_folder(tmp_path, KEYS)


def test_other_tensors_and_no_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    from megatron_md.checkpoint.hf.peft import load_adapters

    fewer: LoraConfig = replace(KEYS, targets=["q", "v"])
    with pytest.raises(ValueError, match=r"its tensors are not the adapters of lora\.targets on 4 layers"):
        load_adapters([], folder / "peft_llada", adapted_config(folder, keys=fewer))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapters([], tmp_path, adapted_config(folder))
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        check_folder(folder, KEYS)
    with pytest.raises(ValueError, match="holds whole weights, no adapters"):
        to_peft(folder / "base", tmp_path / "none", "llada")

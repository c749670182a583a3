"""`adapter_config.json` of a PEFT folder with LoRA adapters: read and held against a run's config, and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_md.checkpoint.hf.families import Family
from megatron_md.config import LoraConfig
from megatron_md.config.lora import LINEARS
from megatron_md.errors import UserError
from megatron_md.json_file import read_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_WAY_OUT = "give a folder that PEFT's save_pretrained has written"
# What else adapters of PEFT may be; ours are none of it.
_UNSUPPORTED = (
    "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save",
    "layers_to_transform", "layer_replication", "trainable_token_indices", "target_parameters",
)  # fmt: skip


def check_folder(path: Path, keys: LoraConfig) -> None:
    """Check that a folder's adapters can be those of a run; its tensors are looked at when they are read.

    Raises:
        UserError: it is no PEFT folder, or its adapters are of another kind, rank or scale.
    """
    file = path / CONFIG_NAME
    if not (path / WEIGHTS_NAME).is_file():
        raise UserError(f"lora.load: {path}: has no {WEIGHTS_NAME}; {_WAY_OUT}")
    content = read_json(file, _WAY_OUT)
    if content.get("peft_type") != "LORA":
        raise UserError(f"lora.load: {file}: peft_type is {str(content.get('peft_type'))[:40]!r}, not 'LORA'")
    for key in _UNSUPPORTED:
        if content.get(key):
            raise UserError(f"lora.load: {file}: {key} is set, which the adapters here do not have")
    if content.get("bias", "none") != "none":
        raise UserError(f"lora.load: {file}: bias is {str(content['bias'])[:40]!r}; biases stay as they are here")
    for key, name, here in (("r", "rank", keys.rank), ("lora_alpha", "alpha", keys.alpha)):
        if content.get(key) != here:
            there = str(content.get(key))[:40]
            raise UserError(f"lora.load: {file}: {key} is {there}, and lora.{name} {here:g}: set lora.{name}={there}")


def modules(family: Family, keys: LoraConfig) -> dict[str, str]:
    """The module in a family's model, with `{layer}`, of each part that has an adapter."""
    rules = {rule.ours: rule for rule in family.rules}
    return {
        part: rules[linear.weight].theirs[number].removesuffix(".weight")
        for linear in LINEARS
        for number, part in enumerate(linear.parts)
        if part in linear.adapted(keys.targets)
    }


def written(family: Family, keys: LoraConfig, base: str) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Args:
        family: of the model that the adapters are for.
        keys: rank, scale, dropout, matrices.
        base: what the config calls that model.
    """
    names = sorted(modules(family, keys).values())
    ends = sorted({name.rpartition(".")[2] for name in names})
    head = next(rule for rule in family.rules if rule.ours == "output_layer.weight").theirs[0].split(".")[-2]
    # PEFT compares ends of names, and takes a text for a regular expression: LLaDA's head is called as its down matrix.
    pattern = "|".join(name.replace(".", r"\.").replace("{layer}", r"\d+") for name in names)
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        "r": keys.rank,
        "lora_alpha": int(keys.alpha) if keys.alpha == int(keys.alpha) else keys.alpha,
        "lora_dropout": keys.dropout,
        "target_modules": f"({pattern})" if head in ends else ends,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }

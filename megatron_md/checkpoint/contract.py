"""What a checkpoint and the run that goes on from it must agree on, and what a changed key means for that."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_md.checkpoint.directory import CONFIG_NAME
from megatron_md.config import ResolvedConfig
from megatron_md.config import loader as config_loader
from megatron_md.messages import redacted

# What a checkpoint must agree on to be resumed, besides `model_identity`.
REFUSED = (
    "seed",
    "data.seq_length",
    "data.max_tokens",
    "data.window_shards",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
)
DEPENDS = {
    "data.chat": "refused if rows are made of the dialogues in another way",
    "data.train": "refused unless it is the same corpus",
    "data.tokenizer": "refused unless it is the same tokenizer",
    "model.vocab": "refused unless tokenizer or shards give the same number",
    "objective.pairs": "refused if rows show a text once in one and twice in the other",
    "train.precision": "refused if the optimizer keeps its state differently",
    "megatron": "refused if model or optimizer change by it",
}


def model_identity(config: ResolvedConfig) -> dict[str, Any]:
    """What a model's weights and its function depend on, under the names of the config; defaults spelt out."""
    model = config.model
    content = asdict(model)
    for key in ("preset", "init_std", "scaled_init", "is_length_given"):
        del content[key]
    content["kv_heads"], content["head_dim"] = model.key_heads, model.head_width
    # Rotary positions have no weights: the longest row may change.
    content["max_length"] = None if model.position == "rope" else model.max_length
    return {f"model.{key}": value for key, value in content.items()}


def resume_contract(
    config: ResolvedConfig, stream: dict[str, Any], *, tokenizer: str, causal: bool, base: str | None = None
) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must agree on: JSON values by name.

    Args:
        config: of the run.
        stream: `RowStream.state` of the rows that the checkpoint has seen.
        tokenizer: hash of the tokenizer that the corpora were made with.
        causal: the objective's attention.
        base: hash of the weights that adapters are trained on.
    """
    adapters = {"lora": config.lora.identity() if config.lora else None, "lora.base": base}
    # Not in the checkpoints of runs that show every text once.
    pairs = {"objective.pairs": config.objective.pairs if config.objective.rows_per_text > 1 else None}
    own = {"tokenizer": tokenizer, "objective is causal": causal}
    return {**stream, **model_identity(config), **own, **adapters, **pairs}


def config_changes(checkpoint: Path, resolved_config: str) -> dict[str, list[Any]]:
    """Keys in which a config differs from the checkpoint's: [value there, value now] by dotted name."""
    then = flat(redacted(config_loader.read_yaml(str(checkpoint / CONFIG_NAME))))
    now = flat(config_loader.parse_yaml(resolved_config, "config"))
    keys = sorted(then.keys() | now.keys())
    return {key: [then.get(key), now.get(key)] for key in keys if then.get(key) != now.get(key)}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted names."""
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)  # which equals itself, and which JSON knows
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def reason(key: str) -> str:
    """What an undecided key depends on."""
    return next((text for name, text in DEPENDS.items() if _is_below(key, name)), "")


def effect(key: str, change: list[Any], differing: set[str]) -> str:
    """What resuming makes of a key that has changed: refused, depends or harmless.

    Args:
        key: dotted name.
        change: its value there and now.
        differing: keys in which the models differ.
    """
    if key == "objective.name":
        return "refused" if "autoregressive" in change else "harmless"
    if key in REFUSED or key in differing:
        return "refused"
    return "depends" if reason(key) else "harmless"


def _is_below(key: str, name: str) -> bool:
    return key == name or key.startswith((f"{name}.", f"{name}["))

"""A family of Hugging Face checkpoints of one's own: Mistral without sliding windows, which is Llama by another name.

Importing this module makes `md.convert(..., family="mistral", to="megatron")` and its way back work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_md.checkpoint.hf.configs import UnsupportedConfigError, read_llama_like, write_llama_like
from megatron_md.checkpoint.hf.families import FAMILIES
from megatron_md.config import ResolvedModel


def read_mistral(config: Mapping[str, Any]) -> ResolvedModel:
    """The shape of a model by its `config.json`.

    Raises:
        UnsupportedConfigError: it has something that our model cannot follow.
    """
    if config.get("sliding_window") is not None:
        raise UnsupportedConfigError(f"sliding_window is {config['sliding_window']}; only null is supported")
    return read_llama_like(config, model_type="mistral", qkv_bias=False, qk_norm=False)


def write_mistral(model: ResolvedModel, tokens: Mapping[str, int], length: int) -> dict[str, Any]:
    """A `config.json`; without the last key transformers would take a window of 4,096."""
    llama = write_llama_like(model, tokens, length, architecture="MistralForCausalLM", model_type="mistral")
    return {**llama, "sliding_window": None}


# The tensors are Llama's, under Llama's names: `rules` stay.
FAMILIES["mistral"] = replace(FAMILIES["llama"], name="mistral", read_config=read_mistral, write_config=write_mistral)

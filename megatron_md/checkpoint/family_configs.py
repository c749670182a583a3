"""The `config.json` of each family of Hugging Face checkpoints: read into our model's shape, and written for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_md.config import ModelConfig

# The published modelling code, which `auto_map` points at; it is neither shipped nor run here.
LLADA_CODE = "GSAI-ML/LLaDA-8B-Base"
DREAM_CODE = "Dream-org/Dream-v0-Base-7B"


class UnsupportedConfigError(ValueError):
    """A `config.json` asks for something that our model does not have."""


def _refuse(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise UnsupportedConfigError(f"{key} is {config[key]!r}; only {wanted} is supported")


def _need(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise UnsupportedConfigError(f"{key} is missing")
    return config[key]


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies; transformers 5 keeps it under `rope_parameters`."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise UnsupportedConfigError(f"rotary positions are scaled ({kind!r}); only the default ones are supported")
    return float(parameters.get("rope_theta") or _need(config, "rope_theta"))


def read_llama_like(config: Mapping[str, Any], *, model_type: str, qkv_bias: bool, qk_norm: bool) -> ModelConfig:
    """The shape of a Llama, Qwen2, Qwen3 or Dream model.

    Raises:
        UnsupportedConfigError: a key is missing, or has a value that our model cannot follow.
    """
    _refuse(
        config,
        {
            "model_type": (model_type,),
            "hidden_act": ("silu",),
            "mlp_bias": (False,),
            "attention_bias": (qkv_bias, None) if qkv_bias else (False, None),
            "use_sliding_window": (False, None),
        },
    )
    hidden, heads = int(_need(config, "hidden_size")), int(_need(config, "num_attention_heads"))
    length = config.get("max_position_embeddings")
    return ModelConfig(
        layers=int(_need(config, "num_hidden_layers")),
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        ffn=int(_need(config, "intermediate_size")),
        tied=bool(config.get("tie_word_embeddings", False)),
        vocab=int(_need(config, "vocab_size")),
        max_length=int(length) if length else None,
        rope_theta=_rope_theta(config),
        norm_eps=float(_need(config, "rms_norm_eps")),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )


def write_llama_like(
    model: ModelConfig, tokens: Mapping[str, int], length: int, *, architecture: str, model_type: str
) -> dict[str, Any]:
    """A `config.json` of transformers' Llama, Qwen2 or Qwen3, or of what has their keys."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.head_dim or model.hidden // model.heads,
        "vocab_size": model.vocab,
        "max_position_embeddings": length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tied,
        "attention_dropout": 0.0,
        **tokens,
    }


def read_llada(config: Mapping[str, Any]) -> ModelConfig:
    """The shape of a LLaDA model.

    Raises:
        UnsupportedConfigError: a key is missing, or has a value that our model cannot follow.
    """
    _refuse(
        config,
        {
            "model_type": ("llada",),
            "block_type": ("llama",),
            "activation_type": ("silu",),
            "layer_norm_type": ("rms",),
            "rope": (True,),
            "alibi": (False,),
            "include_bias": (False,),
            "include_qkv_bias": (False, None),
            "attention_layer_norm": (False,),
            "input_emb_norm": (False,),
            "scale_logits": (False,),
            "multi_query_attention": (False, None),
        },
    )
    heads, hidden = int(_need(config, "n_heads")), int(_need(config, "d_model"))
    return ModelConfig(
        layers=int(_need(config, "n_layers")),
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("n_kv_heads") or heads),
        head_dim=hidden // heads,
        ffn=int(_need(config, "mlp_hidden_size")),
        tied=bool(config.get("weight_tying", False)),
        vocab=int(config.get("embedding_size") or _need(config, "vocab_size")),
        max_length=int(_need(config, "max_sequence_length")),
        rope_theta=float(config.get("rope_theta", 10000.0)),
        norm_eps=float(config.get("rms_norm_eps", 1e-5)),
    )


def write_dream(model: ModelConfig, tokens: Mapping[str, int], length: int) -> dict[str, Any]:
    """A `config.json` of Dream."""
    content = write_llama_like(model, tokens, length, architecture="DreamModel", model_type="Dream")
    code = {
        "AutoConfig": f"{DREAM_CODE}--configuration_dream.DreamConfig",
        "AutoModel": f"{DREAM_CODE}--modeling_dream.DreamModel",
    }
    return {**content, "auto_map": code}


def write_llada(model: ModelConfig, tokens: Mapping[str, int], length: int) -> dict[str, Any]:
    """A `config.json` of LLaDA.

    Raises:
        UnsupportedConfigError: LLaDA's code cannot follow the model.
    """
    if model.head_dim not in (None, model.hidden // model.heads):
        raise UnsupportedConfigError("model.head_dim: LLaDA's code has heads of hidden / heads only; export as llama")
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "auto_map": {
            "AutoConfig": f"{LLADA_CODE}--configuration_llada.LLaDAConfig",
            "AutoModel": f"{LLADA_CODE}--modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": f"{LLADA_CODE}--modeling_llada.LLaDAModelLM",
        },
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": model.hidden,
        "embedding_dropout": 0.0,
        "embedding_size": model.vocab,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": model.init_std,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "max_sequence_length": length,
        "mlp_hidden_size": model.ffn,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": model.heads,
        "n_kv_heads": model.kv_heads or model.heads,
        "n_layers": model.layers,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": model.norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": model.rope_theta,
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": model.vocab,
        "weight_tying": model.tied,
        **tokens,
    }

"""The `config.json` of each family of Hugging Face checkpoints: read into our model's shape, and written for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_md.config import ResolvedModel
from megatron_md.errors import UserError

# The published modelling code, which `auto_map` points at; it is neither shipped nor run here.
LLADA_CODE = "GSAI-ML/LLaDA-8B-Base"
MOST, MOST_LAYERS = 10**9, 10_000  # of any size of a model
LONGEST_ROW = 4096  # of a converted run, and where a config does not say
DREAM_CODE = "Dream-org/Dream-v0-Base-7B"
SDAR_CODE = "JetLM/SDAR-1.7B-Chat"


class UnsupportedConfigError(UserError):
    """A `config.json` asks for something that our model does not have."""


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."


def _refuse(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise UnsupportedConfigError(f"{key} is {_shown(config[key])}; only {wanted} is supported")


def _need(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise UnsupportedConfigError(f"{key} is missing")
    return config[key]


def _whole(config: Mapping[str, Any], key: str, most: int = MOST) -> int:
    value = _need(config, key)
    if type(value) is not int or not 0 < value <= most:
        raise UnsupportedConfigError(f"{key} is {_shown(value)}; only whole numbers from 1 to {most} are supported")
    return value


def _whole_or(config: Mapping[str, Any], key: str, default: int) -> int:
    return default if config.get(key) is None else _whole(config, key)


def _positive(config: Mapping[str, Any], key: str) -> float:
    value = _need(config, key)
    if type(value) not in (int, float) or not 0.0 < value < math.inf:
        raise UnsupportedConfigError(f"{key} is {_shown(value)}; only numbers above 0 are supported")
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value not in (None, False, True):
        raise UnsupportedConfigError(f"{key} is {_shown(value)}; only true and false are supported")
    return bool(value)


def _width_of_a_head(hidden: int, heads: int, kv_heads: int) -> int:
    if hidden % heads or heads % kv_heads:
        raise UnsupportedConfigError(
            f"a width of {hidden}, {heads} heads and {kv_heads} key/value heads do not divide one another"
        )
    return hidden // heads


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies; transformers 5 keeps it under `rope_parameters`."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise UnsupportedConfigError("rope_parameters is not an object")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise UnsupportedConfigError(f"rotary positions are scaled ({_shown(kind)}); only default ones are supported")
    return _positive(parameters if parameters.get("rope_theta") is not None else config, "rope_theta")


def read_llama_like(config: Mapping[str, Any], *, model_type: str, qkv_bias: bool, qk_norm: bool) -> ResolvedModel:
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
    hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
    kv_heads = _whole_or(config, "num_key_value_heads", heads)
    if config.get("head_dim") is None:
        head_dim = _width_of_a_head(hidden, heads, kv_heads)
    else:
        head_dim = _whole(config, "head_dim")
        _width_of_a_head(heads, heads, kv_heads)
    length = config.get("max_position_embeddings")
    return ResolvedModel(
        layers=_whole(config, "num_hidden_layers", MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=_whole(config, "intermediate_size"),
        tied=_flag(config, "tie_word_embeddings"),
        vocab=_whole(config, "vocab_size"),
        max_length=LONGEST_ROW if length is None else _whole(config, "max_position_embeddings"),
        is_length_given=length is not None,
        rope_theta=_rope_theta(config),
        norm_eps=_positive(config, "rms_norm_eps"),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )


def write_llama_like(
    model: ResolvedModel, tokens: Mapping[str, int], length: int, *, architecture: str, model_type: str
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
        "num_key_value_heads": model.key_heads,
        "head_dim": model.head_width,
        "vocab_size": model.vocab,
        "max_position_embeddings": length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tied,
        "attention_dropout": 0.0,
        **tokens,
    }


def read_llada(config: Mapping[str, Any]) -> ResolvedModel:
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
    heads, hidden = _whole(config, "n_heads"), _whole(config, "d_model")
    kv_heads = _whole_or(config, "n_kv_heads", heads)
    return ResolvedModel(
        layers=_whole(config, "n_layers", MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_width_of_a_head(hidden, heads, kv_heads),
        ffn=_whole(config, "mlp_hidden_size"),
        tied=_flag(config, "weight_tying"),
        vocab=_whole(config, "vocab_size" if config.get("embedding_size") is None else "embedding_size"),
        max_length=_whole(config, "max_sequence_length"),
        rope_theta=_positive({"rope_theta": 10000.0, **config}, "rope_theta"),
        norm_eps=_positive({"rms_norm_eps": 1e-5, **config}, "rms_norm_eps"),
    )


def write_dream(model: ResolvedModel, tokens: Mapping[str, int], length: int) -> dict[str, Any]:
    """A `config.json` of Dream."""
    content = write_llama_like(model, tokens, length, architecture="DreamModel", model_type="Dream")
    code = {
        "AutoConfig": f"{DREAM_CODE}--configuration_dream.DreamConfig",
        "AutoModel": f"{DREAM_CODE}--modeling_dream.DreamModel",
    }
    return {**content, "auto_map": code}


def write_sdar(model: ResolvedModel, keys: Mapping[str, int], length: int) -> dict[str, Any]:
    """A `config.json` of SDAR; its `block_size` is among the keys."""
    content = write_llama_like(model, keys, length, architecture="SDARForCausalLM", model_type="sdar")
    return {
        **content,
        "auto_map": {
            "AutoConfig": f"{SDAR_CODE}--configuration_sdar.SDARConfig",
            "AutoModel": f"{SDAR_CODE}--modeling_sdar.SDARModel",
            "AutoModelForCausalLM": f"{SDAR_CODE}--modeling_sdar.SDARForCausalLM",
        },
        "attention_bias": False,
        "fuse_cross_entropy": True,  # which its code asks for in every forward pass, and which has no default
        "initializer_range": model.init_std,
        "max_window_layers": model.layers,
        "rope_scaling": None,
        "sliding_window": None,
        "use_cache": False,
        "use_sliding_window": False,
    }


def read_block_size(config: Mapping[str, Any], asked: int | None, longest: int) -> int:
    """The tokens of a block of a block model: what its `config.json` says, else what is `asked` for.

    Raises:
        UnsupportedConfigError: neither says, they differ, or no row holds such a block.
    """
    given = config.get("block_size")
    if given is None and asked is None:
        raise UnsupportedConfigError("block_size is missing; say by --block-size what the model was trained with")
    if asked is not None and given not in (None, asked):
        raise UnsupportedConfigError(
            f"block_size is {_shown(given)}, and --block-size {asked}; leave that out, or correct the file"
        )
    return _whole({"block_size": asked if given is None else given}, "block_size", longest)


def write_llada(model: ResolvedModel, tokens: Mapping[str, int], length: int) -> dict[str, Any]:
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
        "n_kv_heads": model.key_heads,
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

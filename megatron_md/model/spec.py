"""The layer spec: megatron-core's transformer layer with the attention mask fixed to bidirectional (or causal).

Two backends build the same network: Transformer Engine's modules where it is installed and the device is CUDA,
else megatron-core's own linear layers with torch's RMSNorm and scaled-dot-product attention. Under context parallelism
that attention serves both: Transformer Engine's wants each rank to hold two far ends of a row, as causal masks ask for.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_md.model.attention import SDPACoreAttention


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as megatron-core's layers build it.

    Under sequence parallelism each rank sees its own slice of the sequence, so the weight carries the mark by which
    megatron-core adds up its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def use_transformer_engine(device: torch.device) -> bool:
    """True where Transformer Engine is importable and the model lives on CUDA."""
    return bool(gpt_layer_specs.HAVE_TE) and device.type == "cuda"


def core_attention(rotary_base: float | None) -> ModuleSpec:
    """Our core attention; with a base it applies rotary positions, else the model does."""
    return ModuleSpec(module=SDPACoreAttention, params={"rotary_base": rotary_base})


def layer_spec(
    config: TransformerConfig, *, causal: bool, transformer_engine: bool, attention: ModuleSpec | None
) -> ModuleSpec:
    """Spec of one transformer layer.

    Args:
        config: the transformer's shape.
        causal: causal attention (the autoregressive baseline) instead of bidirectional.
        transformer_engine: build it from Transformer Engine's modules.
        attention: the core attention; None takes Transformer Engine's.
    """
    if transformer_engine:
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            spec.submodules.self_attention.submodules.q_layernorm = RMSNorm
            spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
    if attention is not None:
        spec.submodules.self_attention.submodules.core_attention = attention
    spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.causal if causal else AttnMaskType.no_mask
    return spec


def block_spec(
    config: TransformerConfig,
    *,
    causal: bool,
    transformer_engine: bool,
    attention: ModuleSpec | None,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """Spec of this pipeline stage's layers and, on the last stage, of the final norm."""
    spec = layer_spec(config, causal=causal, transformer_engine=transformer_engine, attention=attention)
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    else:
        norm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm
    )

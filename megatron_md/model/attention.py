"""Core attention of the local layer spec: torch's scaled-dot-product attention (flash kernels where it has them)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig


class SDPACoreAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v for the heads of one tensor-parallel rank; bidirectional or causal.

    Drop-in for megatron-core's `DotProductAttention` in a layer spec; it holds no parameters. Which of the two masks
    applies is fixed by the spec (`attn_mask_type`), never by a call.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        if attn_mask_type not in (AttnMaskType.no_mask, AttnMaskType.causal):
            raise ValueError(f"attention supports no_mask and causal, not {attn_mask_type}")
        assert config.attention_dropout == 0.0, "the SDPA core attention has no dropout"
        assert config.context_parallel_size == 1, "the SDPA core attention does not split the sequence"
        self.is_causal = attn_mask_type is AttnMaskType.causal
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [L, B, heads, d] of this rank.
            key: [L, B, kv_heads, d] of this rank.
            value: [L, B, kv_heads, d] of this rank.
            attention_mask: must be None; the spec decides.
            attn_mask_type: ignored, as in megatron-core's local attention.
            attention_bias: must be None.
            packed_seq_params: must be None.

        Returns:
            [L, B, heads * d].
        """
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        length, rows, heads, width = query.shape
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=self.is_causal,
            scale=self.softmax_scale,
            enable_gqa=key.shape[2] != heads,
        )
        return context.permute(2, 0, 1, 3).reshape(length, rows, heads * width)

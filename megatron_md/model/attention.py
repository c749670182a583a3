"""Core attention of the local layer spec: torch's scaled-dot-product attention (flash kernels where it has them)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_md.batch import Int32Array
from megatron_md.errors import UserError
from megatron_md.model.block_attention import BlockRows, attend_in_blocks
from megatron_md.model.kept_rows import KeptRows
from megatron_md.model.ulysses import own_slice, whole_rows

try:
    from torch.nn.attention.varlen import varlen_attn

    HAS_VARLEN = "enable_gqa" in signature(varlen_attn).parameters  # torch 2.13; earlier ones lack what we need of it
except ImportError:
    HAS_VARLEN = False


@lru_cache(maxsize=8)
def rotary_tables(length: int, width: int, base: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin of `position * base^(-2j / width)`, fp32 [L, 1, 1, width / 2] each (Su et al. 2021)."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), base**-exponents)
    return angles.cos()[:, None, None], angles.sin()[:, None, None]


def rotate_half(x_LBHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """Pairs (j, j + d/2) of x turned by their angles times `sign`, in fp32."""
    first, second = x_LBHD.float().chunk(2, dim=-1)
    sin = sin * sign
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_LBHD.dtype)


_rotate_half_in_one_kernel = torch.compile(rotate_half)


def _rotated(x_LBHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """`rotate_half`, the fastest way that the device has: on the CPU without tensors in between."""
    if x_LBHD.is_cuda:
        return _rotate_half_in_one_kernel(x_LBHD, cos, sin, sign)
    exact_LBHD = x_LBHD.float()
    out_LBHD = torch.empty_like(exact_LBHD)
    half = x_LBHD.shape[-1] // 2
    first, second = exact_LBHD[..., :half], exact_LBHD[..., half:]
    torch.mul(first, cos, out=out_LBHD[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_LBHD[..., half:]).addcmul_(first, sin, value=sign)
    return out_LBHD.to(x_LBHD.dtype)


class _Rotary(torch.autograd.Function):
    """Rotate-half position encoding in fp32; its gradient is the rotation back, so nothing is kept but the tables."""

    @staticmethod
    def forward(ctx: Any, x_LBHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.tables = cos, sin
        return _rotated(x_LBHD, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_LBHD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.tables
        return _rotated(grad_LBHD, cos, sin, -1.0), None, None


def apply_rotary(x_LBHD: torch.Tensor, base: float, seen: PackedSeqParams | None = None) -> torch.Tensor:
    """Rotate pairs (j, j + d/2) of each head of x [L, B, heads, d] by the angles of their positions.

    Those are 0 to L - 1, unless the rows hold a text twice (`BlockRows`) or are a slice (`KeptRows`).
    """
    copies = seen.copies if isinstance(seen, BlockRows) else 1
    start, length = (seen.start, seen.length) if isinstance(seen, KeptRows) else (0, len(x_LBHD) // copies)
    tables = rotary_tables(length, x_LBHD.shape[-1], base, x_LBHD.device)
    if copies > 1:
        tables = (tables[0].repeat(copies, 1, 1, 1), tables[1].repeat(copies, 1, 1, 1))
    elif length != len(x_LBHD):
        own = slice(start, start + len(x_LBHD))
        tables = (tables[0][own], tables[1][own])
    rotated: torch.Tensor = _Rotary.apply(x_LBHD, *tables)
    return rotated


def packed_documents(cu_seqlens: Sequence[Int32Array], device: torch.device) -> PackedSeqParams:
    """The documents of a micro-batch, as megatron-core's models hand them on to the core attention.

    Args:
        cu_seqlens: per row the boundaries of its documents, from 0 to L ascending.
        device: the model's.

    Returns:
        Parameters whose `cu_seqlens_q` are the boundaries in the B rows laid end to end, from 0 to B * L, on the host;
        `cu_seqlens_kv` are the same on the device. The format `sbhd` says that the tensors are not packed.
    """
    lengths = np.concatenate([np.diff(boundaries) for boundaries in cu_seqlens])
    boundaries = torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32))
    return PackedSeqParams(
        qkv_format="sbhd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries.to(device),
        max_seqlen_q=int(lengths.max()),
    )


def additive_mask(is_hidden_LL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores so that no query sees a key hidden from it: 0 or -inf, [1, 1, L, L]."""
    return torch.zeros(is_hidden_LL.shape, dtype=dtype, device=is_hidden_LL.device).masked_fill_(
        is_hidden_LL, -math.inf
    )[None, None]


class SDPACoreAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v for the heads of one tensor-parallel rank; bidirectional or causal.

    Drop-in for megatron-core's `DotProductAttention` in a layer spec; it holds no parameters. Which of the two applies
    is fixed by the spec (`attn_mask_type`); a call of the bidirectional one may hide some pairs. With `rotary_base` it
    also encodes positions: megatron-core's unfused rotary embedding costs several passes over queries and keys, and
    rounds to bf16. Under context parallelism a call's L is that of this rank's slice of the rows, except where it says
    whole rows (see `ulysses`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        rotary_base: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        if attn_mask_type not in (AttnMaskType.no_mask, AttnMaskType.causal):
            raise UserError(f"attention supports no_mask and causal, not {attn_mask_type}")
        assert config.attention_dropout == 0.0, "the SDPA core attention has no dropout"
        assert config.context_parallel_size == 1 or pg_collection is not None
        self.context_group = pg_collection.cp if pg_collection and config.context_parallel_size > 1 else None
        self.rotary_base = rotary_base
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
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend, over whole rows or within the documents of `packed_seq_params`.

        Args:
            query: [L, B, heads, d] of this rank.
            key: [L, B, kv_heads, d] of this rank.
            value: [L, B, kv_heads, d] of this rank.
            attention_mask: `additive_mask` in the data type of the query, over whole rows under a bidirectional spec
                only; None hides nothing.
            attn_mask_type: ignored, as in megatron-core's local attention.
            attention_bias: must be None.
            packed_seq_params: `packed_documents` of the rows, the `BlockRows` of a block model, or the `KeptRows` of a
                slice; None: each row is one document.

        Returns:
            [L, B, heads * d].
        """
        assert attention_bias is None
        assert attention_mask is None or not (self.is_causal or packed_seq_params)
        if self.context_group is not None:
            query, key, value = whole_rows(query, key, value, self.context_group)
        context = self._attend_rows(query, key, value, attention_mask, packed_seq_params)
        return context if self.context_group is None else own_slice(context, query.shape[3], self.context_group)

    def _attend_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> torch.Tensor:
        """As `forward`, of whole rows."""
        length, rows, heads, width = query.shape
        if self.rotary_base is not None:
            query, key = (apply_rotary(x, self.rotary_base, packed_seq_params) for x in (query, key))
        if isinstance(packed_seq_params, BlockRows):
            context = attend_in_blocks(query, key, value, packed_seq_params, self._attend, self.softmax_scale)
            return context.reshape(length, rows, heads * width)
        if isinstance(packed_seq_params, KeptRows):
            key, value = packed_seq_params.around(id(self), key, value)
            attention_mask, packed_seq_params = packed_seq_params.mask, None
        if packed_seq_params is None:
            return self._attend(query, key, value, attention_mask).reshape(length, rows, heads * width)
        query, key, value = (x_LBHD.transpose(0, 1).flatten(0, 1) for x_LBHD in (query, key, value))
        context = self._attend_within(query, key, value, packed_seq_params)
        return context.view(rows, length, heads * width).transpose(0, 1).contiguous()

    def _attend_within(
        self, query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, documents: PackedSeqParams
    ) -> torch.Tensor:
        """Attention within documents of T tokens in all, laid end to end: [T, heads, d]."""
        if HAS_VARLEN and query_THD.is_cuda and query_THD.dtype is not torch.float32:
            boundaries, longest = documents.cu_seqlens_kv, documents.max_seqlen_q
            context_THD = varlen_attn(
                query_THD,
                key_THD,
                value_THD,
                boundaries,
                boundaries,
                longest,
                longest,
                scale=self.softmax_scale,
                window_size=(-1, 0) if self.is_causal else (-1, -1),
                enable_gqa=key_THD.shape[1] != query_THD.shape[1],
            )
            assert isinstance(context_THD, torch.Tensor), "without auxiliary outputs"
            return context_THD
        lengths = documents.cu_seqlens_q.diff().tolist()
        # The gradient of `split` is put together once; that of a slice per document would be a whole tensor each.
        parts = [x_THD[:, None].split(lengths) for x_THD in (query_THD, key_THD, value_THD)]
        return torch.cat([self._attend(*document) for document in zip(*parts, strict=True)])

    def _attend(
        self,
        query_LBHD: torch.Tensor,
        key_LBHD: torch.Tensor,
        value_LBHD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of all L tokens (or those to the left) for each: [L, B, heads, d]."""
        groups, heads = key_LBHD.shape[2], query_LBHD.shape[2]
        if attention_mask is not None and groups != heads:
            # On CUDA, the memory-efficient kernel takes a mask but knows no groups, and the flash kernel the reverse.
            key_LBHD, value_LBHD = (x.repeat_interleave(heads // groups, dim=2) for x in (key_LBHD, value_LBHD))
        context_BHLD = F.scaled_dot_product_attention(
            query_LBHD.permute(1, 2, 0, 3),
            key_LBHD.permute(1, 2, 0, 3),
            value_LBHD.permute(1, 2, 0, 3),
            attn_mask=attention_mask,
            is_causal=self.is_causal,
            scale=self.softmax_scale,
            enable_gqa=key_LBHD.shape[2] != query_LBHD.shape[2],
        )
        return context_BHLD.permute(2, 0, 1, 3)

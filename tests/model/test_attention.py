"""The SDPA core attention against the definition, and against megatron-core's own local attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_md.config import Config
from megatron_md.cpu import CPU
from megatron_md.model.attention import (
    SDPACoreAttention,
    additive_mask,
    apply_rotary,
    packed_documents,
    rotary_tables,
    rotate_half,
)
from megatron_md.model.build import transformer_config
from megatron_md.parallel import World


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_definition_with_grouped_heads(small_config: Config, world: World, causal: bool) -> None:
    core = transformer_config(small_config, world.device)
    kind = AttnMaskType.causal if causal else AttnMaskType.no_mask
    attention = SDPACoreAttention(core, layer_number=1, attn_mask_type=kind, attention_type="self")
    length, rows, heads, groups, width = 5, 2, 4, 2, 8
    query = torch.randn(length, rows, heads, width)
    key, value = torch.randn(length, rows, groups, width), torch.randn(length, rows, groups, width)
    got = attention(query, key, value, None).view(length, rows, heads, width)
    for row in range(rows):
        for head in range(heads):
            scores = query[:, row, head] @ key[:, row, head // 2].t() / math.sqrt(width)
            if causal:
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
            expected = scores.softmax(-1) @ value[:, row, head // 2]
            torch.testing.assert_close(got[:, row, head], expected)


DOCUMENTS = {
    "one": [[0, 13], [0, 13], [0, 13]],
    "many": [[0, 5, 6, 11, 13], [0, 1, 13], [0, 12, 13]],
    "single tokens": [list(range(14)), [0, 13], [0, 1, 2, 13]],
}


def within_documents(
    core: TransformerConfig, causal: bool, documents: str, groups: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Attention within documents, and the gradients of its inputs: ours, and by a dense mask."""
    kind = AttnMaskType.causal if causal else AttnMaskType.no_mask
    attention = SDPACoreAttention(core, layer_number=1, attn_mask_type=kind, attention_type="self")
    length, rows, heads, width = 13, 3, 4, 8
    shapes = [(length, rows, count, width) for count in (heads, groups, groups)]
    inputs = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    query, key, value = inputs
    cu_seqlens = [np.array(boundaries, dtype=np.int32) for boundaries in DOCUMENTS[documents]]
    got = attention(query, key, value, None, packed_seq_params=packed_documents(cu_seqlens, device))

    number_BL = torch.stack([torch.bucketize(torch.arange(length), torch.tensor(c), right=True) for c in cu_seqlens])
    is_visible_BLL = number_BL[:, :, None] == number_BL[:, None]
    if causal:
        is_visible_BLL = is_visible_BLL & torch.ones(length, length).tril().bool()
    keys, values = (x.repeat_interleave(heads // groups, 2) for x in (key, value))
    scores = torch.einsum("lbhd,mbhd->bhlm", query, keys) / math.sqrt(width)
    weights = scores.masked_fill(~is_visible_BLL[:, None].to(device), float("-inf")).softmax(-1)
    expected = torch.einsum("bhlm,mbhd->lbhd", weights, values).reshape(length, rows, heads * width)
    probe = torch.randn_like(got)
    ours, dense = ([x, *torch.autograd.grad((x * probe).sum(), inputs)] for x in (got, expected))
    return ours, dense


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("groups", "dtype"), [(2, torch.float64), (4, torch.float32)])
def test_within_documents_equals_a_dense_masked_softmax(
    small_config: Config, world: World, causal: bool, documents: str, groups: int, dtype: torch.dtype
) -> None:
    core = transformer_config(small_config, world.device)
    torch.testing.assert_close(*within_documents(core, causal, documents, groups, dtype, CPU))


@pytest.mark.parametrize(("groups", "dtype"), [(2, torch.float64), (4, torch.float32), (1, torch.float64)])
def test_hidden_pairs_equal_a_dense_masked_softmax(
    small_config: Config, world: World, groups: int, dtype: torch.dtype
) -> None:
    core = transformer_config(small_config, world.device)
    attention = SDPACoreAttention(
        core, layer_number=1, attn_mask_type=AttnMaskType.no_mask, attention_type="self", rotary_base=100.0
    )
    length, rows, heads, width = 13, 3, 4, 8
    query = torch.randn(length, rows, heads, width, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(length, rows, groups, width, dtype=dtype, requires_grad=True) for _ in range(2))
    is_hidden_LL = torch.ones(length, length).triu(1).bool() & (torch.rand(length, length) < 0.5)
    got = attention(query, key, value, additive_mask(is_hidden_LL, dtype))

    keys, values = (x.repeat_interleave(heads // groups, 2) for x in (apply_rotary(key, 100.0), value))
    scores = torch.einsum("lbhd,mbhd->bhlm", apply_rotary(query, 100.0), keys) / math.sqrt(width)
    weights = scores.masked_fill(is_hidden_LL, float("-inf")).softmax(-1)
    expected = torch.einsum("bhlm,mbhd->lbhd", weights, values).reshape(length, rows, heads * width)
    torch.testing.assert_close(got, expected)
    probe = torch.randn_like(got)
    gradients, expected_gradients = (
        torch.autograd.grad((x * probe).sum(), (query, key, value)) for x in (got, expected)
    )
    torch.testing.assert_close(gradients, expected_gradients)


def test_boundaries_of_rows_laid_end_to_end() -> None:
    packed = packed_documents([np.array([0, 3, 5], dtype=np.int32), np.array([0, 1, 5], dtype=np.int32)], CPU)
    assert packed.cu_seqlens_q.tolist() == [0, 3, 5, 6, 10] and packed.cu_seqlens_q.dtype == torch.int32
    assert packed.max_seqlen_q == 4


def test_other_masks_are_refused(small_config: Config, world: World) -> None:
    core = transformer_config(small_config, world.device)
    with pytest.raises(ValueError, match="no_mask and causal"):
        SDPACoreAttention(core, layer_number=1, attn_mask_type=AttnMaskType.padding, attention_type="self")


def test_rotary_equals_megatron_cores_and_its_gradient(world: World) -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding, apply_rotary_pos_emb

    core = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, apply_rope_fusion=False)
    angles = RotaryEmbedding(kv_channels=8, rotary_percent=1.0, rotary_base=500, use_cpu_initialization=True)(7)
    ours, theirs = (torch.randn(7, 3, 2, 8, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    ours.requires_grad_(), theirs.requires_grad_()
    first, second = apply_rotary(ours, 500.0), apply_rotary_pos_emb(theirs, angles, core)
    torch.testing.assert_close(first, second)
    weight = torch.randn(first.shape)
    (first * weight).sum().backward()
    (second * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_rotary_scores_depend_on_distance_only_and_stay_exact_in_bf16(world: World) -> None:
    query, key = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    scores = (
        apply_rotary(query.expand(50, 1, 1, 64), 1e4) * apply_rotary(key.expand(50, 1, 1, 64), 1e4).roll(3, 0)
    ).sum(-1)
    torch.testing.assert_close(scores[3:], scores[3:4].expand(47, 1, 1), rtol=1e-4, atol=1e-4)
    x = torch.randn(200, 2, 2, 64)
    rounded = apply_rotary(x.bfloat16(), 1e4)
    torch.testing.assert_close(rounded, apply_rotary(x.bfloat16().float(), 1e4).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_function_that_cuda_compiles_rotates_as_the_cpu_does(dtype: torch.dtype) -> None:
    x = torch.randn(9, 2, 3, 8, dtype=dtype, requires_grad=True)
    tables = rotary_tables(9, 8, 100.0, CPU)
    rotated = apply_rotary(x, 100.0)
    torch.testing.assert_close(rotate_half(x, *tables, 1.0), rotated)
    (gradient,) = torch.autograd.grad(rotated.float().square().sum(), x)
    torch.testing.assert_close(rotate_half(2.0 * rotated, *tables, -1.0), gradient)

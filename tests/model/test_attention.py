"""The SDPA core attention against the definition, and against megatron-core's own local attention."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_md.config import Config
from megatron_md.model.attention import SDPACoreAttention
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


def test_other_masks_are_refused(small_config: Config, world: World) -> None:
    core = transformer_config(small_config, world.device)
    with pytest.raises(ValueError, match="no_mask and causal"):
        SDPACoreAttention(core, layer_number=1, attn_mask_type=AttnMaskType.padding, attention_type="self")

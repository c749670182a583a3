"""Attention of block models against a mask over all pairs, and its rows against what a block may know."""

from __future__ import annotations

import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_md.config import Config
from megatron_md.model.attention import SDPACoreAttention
from megatron_md.model.block_attention import BlockRows, attend_by_runs, attend_by_tiles, documents_of
from megatron_md.model.build import transformer_config
from megatron_md.parallel import World

ROWS, HEADS, GROUPS, WIDTH = 2, 4, 2, 16
CUTS = [[0, 5, 6, 17], [0, 9]]


def dense_mask(length: int, size: int, *, copies: int = 2, causal_until: int = 0, within: bool = False) -> torch.Tensor:
    """What each place of a row sees, place by place, by the definition: [B, copies * L, copies * L]."""
    is_seen = torch.zeros(ROWS, copies * length, copies * length, dtype=torch.bool)
    for row in range(ROWS):
        number = np.searchsorted(CUTS[row], np.arange(length), side="right")
        for query in range(copies * length):
            for key in range(copies * length):
                noisy_query, noisy_key = (copies == 2 and x < length for x in (query, key))
                at, there = query % length, key % length
                if within and number[at] != number[there]:
                    continue
                if noisy_query:
                    is_seen[row, query, key] = at // size == there // size if noisy_key else there // size < at // size
                elif not noisy_key:
                    is_causal = at < causal_until
                    is_seen[row, query, key] = there <= at if is_causal else there // size <= at // size
    return is_seen


def both(
    core: Any, length: int, size: int, device: torch.device, dtype: torch.dtype, **keys: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Attention and the gradients of its inputs: ours, and by the dense mask."""
    within, copies = keys.pop("within", False), keys.get("copies", 2)
    attention = SDPACoreAttention(core, layer_number=1, attn_mask_type=AttnMaskType.no_mask, attention_type="self")
    shapes = [(copies * length, ROWS, count, WIDTH) for count in (HEADS, GROUPS, GROUPS)]
    inputs = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    cuts = [np.array([*own, length], dtype=np.int32) for own in CUTS]
    documents = documents_of(cuts, length, device) if within else None
    rows = BlockRows(qkv_format="sbhd", block_size=size, length=length, document_BL=documents, **keys)
    got = attention(*inputs, None, packed_seq_params=rows)
    query, key, value = inputs
    keys_of, values = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (key, value))
    scores = torch.einsum("lbhd,mbhd->bhlm", query, keys_of) * attention.softmax_scale
    is_seen = dense_mask(length, size, within=within, **keys).to(device)
    weights = scores.masked_fill(~is_seen[:, None], -math.inf).softmax(-1)
    expected = torch.einsum("bhlm,mbhd->lbhd", weights, values).flatten(2)
    probe = torch.randn_like(got)
    return (
        [got, *torch.autograd.grad((got * probe).sum(), inputs)],
        [expected, *torch.autograd.grad((expected * probe).sum(), inputs)],
    )


@pytest.mark.parametrize("within", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("causal_until", [0, 24])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 8, 24])
def test_equals_a_mask_over_all_pairs(
    small_config: Config, world: World, size: int, copies: int, causal_until: int, within: bool
) -> None:
    core = transformer_config(small_config, world.device)
    keys: dict[str, Any] = {"copies": copies, "causal_until": causal_until, "within": within}
    for ours, dense in zip(*both(core, 24, size, world.device, torch.float64, **keys), strict=True):
        torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("within", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize(("length", "size"), [(160, 32), (258, 129)])
def test_equals_it_over_several_runs_of_blocks(
    small_config: Config, world: World, length: int, size: int, within: bool
) -> None:
    core = transformer_config(small_config, world.device)
    for ours, dense in zip(*both(core, length, size, world.device, torch.float64, within=within), strict=True):
        torch.testing.assert_close(ours, dense)


def test_text_that_is_finished_in_part_is_causal_in_part(small_config: Config, world: World) -> None:
    core = transformer_config(small_config, world.device)
    for ours, dense in zip(*both(core, 24, 8, world.device, torch.float64, copies=1, causal_until=16), strict=True):
        torch.testing.assert_close(ours, dense)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize(("copies", "causal_until", "within"), [(2, 0, False), (2, 256, True), (1, 256, True)])
def test_tiles_equal_runs(copies: int, causal_until: int, within: bool, world: World) -> None:
    """FlexAttention as it is compiled for the CPU, where it has no gradients."""
    cuts = [np.array([*own, 256], dtype=np.int32) for own in CUTS]
    rows = BlockRows(
        block_size=32,
        length=256,
        copies=copies,
        causal_until=causal_until,
        document_BL=documents_of(cuts, 256, world.device) if within else None,
    )
    query, key, value = (torch.randn(copies * 256, ROWS, HEADS, WIDTH) for _ in range(3))

    def attend(query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
        heads_first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).permute(2, 0, 1, 3)

    with torch.no_grad():
        tiles = attend_by_tiles(query, key, value, rows, 1 / math.sqrt(WIDTH))
    torch.testing.assert_close(tiles, attend_by_runs(query, key, value, rows, attend))


@pytest.mark.gpu
@pytest.mark.parametrize("within", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("causal_until", [0, 256])
@pytest.mark.parametrize(("copies", "size"), [(2, 32), (2, 4), (1, 64)])
def test_tiles_on_the_device_equal_it_too(
    small_config: Config, world: World, size: int, copies: int, causal_until: int, within: bool
) -> None:
    core = transformer_config(small_config, world.device)
    keys: dict[str, Any] = {"copies": copies, "causal_until": causal_until, "within": within}
    for ours, dense in zip(*both(core, 256, size, world.device, torch.float32, **keys), strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-2, atol=1e-2)  # its products are in TF32


def test_a_tile_mask_says_the_same_as_a_run_s(world: World) -> None:
    """The one definition of what is seen, as FlexAttention asks it: over all places at once."""
    cuts = [np.array([*own, 24], dtype=np.int32) for own in CUTS]
    rows = BlockRows(block_size=8, length=24, document_BL=documents_of(cuts, 24, world.device))
    place = torch.arange(48)
    is_seen = rows.mask(place, place, "all")[:, 0]
    torch.testing.assert_close(is_seen, dense_mask(24, 8, within=True))

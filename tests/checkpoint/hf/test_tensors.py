"""The layouts of fused tensors, and a streamed checkpoint read slice by slice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_md.checkpoint.hf.families import FAMILIES, check_exportable, family_named
from megatron_md.checkpoint.hf.tensors import merge, moves, split, table
from megatron_md.checkpoint.storage import Slice, TensorReader, write_tensors
from megatron_md.config import Config, ObjectiveConfig
from megatron_md.config.objective import BlockStage
from tests.checkpoint.hf_models import FAMILY_NAMES, shape_of


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_split_undoes_merge(family: str) -> None:
    model = shape_of(family)
    for move in moves(FAMILIES[family], model):
        parts = [torch.randn(shape) for shape in move.shapes]
        whole = merge(parts, move.rule, 2)
        assert tuple(whole.shape) == move.shape
        for part, again in zip(parts, split(whole, move, 2), strict=True):
            assert torch.equal(part, again)


def test_rows_of_a_query_group_lie_together() -> None:
    (move,) = [m for m in moves(FAMILIES["llama"], shape_of("llama")) if m.rule.layout == "qkv" and m.layer == 0]
    # 4 heads of 8 rows in 2 groups: group g has query heads 2g and 2g + 1, key g, value g.
    q, k, v = (
        torch.arange(rows)[:, None].float().expand(-1, 32) + base for rows, base in ((32, 0), (16, 100), (16, 200))
    )
    rows = merge([q, k, v], move.rule, 2)[:, 0].long().tolist()
    group = [*range(16), *range(100, 108), *range(200, 208), *range(16, 32), *range(108, 116), *range(208, 216)]
    assert rows == group


def test_the_table_names_every_tensor_once() -> None:
    for family in FAMILIES.values():
        model = shape_of(family.name)
        rows = table(family, model)
        assert len({ours for ours, *_ in rows}) == len(rows)
        names = [name for move in moves(family, model) for name in move.theirs]
        assert (
            len(names)
            == len(set(names))
            == 3 + model.layers * sum(len(rule.theirs) for rule in family.rules if rule.is_layer)
        )


def test_what_a_family_cannot_express_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model\.qkv_bias is True, which llada cannot express; export as qwen2 or dream"
    ):
        check_exportable(Config(model=shape_of("qwen2")), FAMILIES["llada"])
    causal, shifted = ObjectiveConfig(name="autoregressive"), ObjectiveConfig(right_shift=True)
    for family, objective, text in (
        ("llada", causal, "objective.name is autoregressive, and llada is no causal model"),
        (
            "llada",
            shifted,
            "objective.right_shift is True, and the code of llada takes the output at a position for that",
        ),
        (
            "dream",
            ObjectiveConfig(),
            "objective.right_shift is False, and the code of dream .* for the next position's",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            check_exportable(Config(model=shape_of(family), objective=objective), FAMILIES[family])
    for objective in (causal, shifted, ObjectiveConfig()):
        check_exportable(Config(model=shape_of("llama"), objective=objective), FAMILIES["llama"])
    with pytest.raises(ValueError, match="--family bert: unknown; known are llada, dream, llama, qwen2, qwen3, sdar"):
        family_named("bert")


def test_block_models_go_to_families_of_block_models_and_nothing_else_does() -> None:
    stages = [BlockStage(1, 0.5), BlockStage(8)]
    for size in (4, stages):
        blocks = ObjectiveConfig(name="block_diffusion", block_size=size)
        check_exportable(Config(model=shape_of("sdar"), objective=blocks), FAMILIES["sdar"])
        for family in (name for name in FAMILY_NAMES if name != "sdar"):
            text = f"objective.name is block_diffusion, and the code of {family} knows no blocks; export as sdar"
            with pytest.raises(ValueError, match=text):
                check_exportable(Config(model=shape_of(family), objective=blocks), FAMILIES[family])
    causal_half = ObjectiveConfig(name="block_diffusion", block_size=4, autoregressive_weight=0.5)
    for family, objective, text in (
        ("sdar", ObjectiveConfig(), "objective.name is masked_diffusion, and sdar is for block models; export as"),
        ("sdar", causal_half, "objective.autoregressive_weight is 0.5: the clean half is causal then, .* with 0 can"),
        ("llada", blocks, r"model.qk_norm is False, which sdar cannot express; train with model.qk_norm=true"),
    ):
        with pytest.raises(ValueError, match=text):
            check_exportable(Config(model=shape_of(family), objective=objective), FAMILIES["sdar"])


def test_slices_are_made_one_at_a_time_and_read_back(tmp_path: Path) -> None:
    whole = torch.randn(3, 4, 5)
    alive: list[int] = []

    def maker(number: int) -> torch.Tensor:
        alive.append(number)
        return whole[number : number + 1]

    slices = [Slice("w", (3, 4, 5), (n, 0, 0), (1, 4, 5), torch.float32, lambda n=n: maker(n)) for n in range(3)]
    write_tensors(tmp_path, slices)
    assert sorted(alive) == [0, 1, 2]
    reader = TensorReader(tmp_path)
    assert reader.tensors == {"w": ((3, 4, 5), torch.float32)}
    assert torch.equal(reader.read("w", (1, 1, 2), (2, 3, 3)), whole[1:, 1:, 2:])

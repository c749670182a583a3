"""Block diffusion through the whole step: the same on every layout, and equal to what it stands for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_md.config import Config
from megatron_md.config.objective import BlockStage
from tests.ranks import run_ranks
from tests.small_run import LENGTH, ROWS, small_run, variant
from tests.train.test_step import LAYOUTS, STEPS, assert_same, reference, slow, train

BLOCKS: dict[str, dict[str, Any]] = {
    "blocks of 8": {"block_size": 8},
    "with a causal clean half": {"block_size": 8, "autoregressive_weight": 2.0},
    "in stages": {"block_size": [BlockStage(1, 0.25), BlockStage(8, 0.5), BlockStage(LENGTH)]},
}


def blocks(name: str, **sections: dict[str, Any]) -> Config:
    config = variant(objective={"name": "block_diffusion", **BLOCKS[name]}, train={"steps": 2 * (STEPS - 1)})
    return variant(config, **sections)


@cache
def alone(name: str, document_attention: str = "full") -> dict[str, Any]:
    return run_ranks(train, 1, blocks(name, data={"document_attention": document_attention}), STEPS)[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("tensor2", "blocks of 8"),
        ("tensor2+sequence", "with a causal clean half"),
        ("pipeline2-interleaved", "in stages"),
        ("pipeline2", "blocks of 8"),
        ("data2", "in stages"),
        ("context2", "blocks of 8"),
        ("context2xtensor2+sequence", "in stages"),
        *(
            pytest.param(layout, name, marks=pytest.mark.slow)
            for layout in (
                "tensor2+sequence",
                "pipeline2-interleaved",
                "data2-overlap",
                "context4",
                "context2xpipeline2",
            )
            for name in BLOCKS
            if (layout, name)
            not in (("tensor2+sequence", "with a causal clean half"), ("pipeline2-interleaved", "in stages"))
        ),
    ],
)
def test_layout_reproduces_one_process(layout: str, name: str) -> None:
    size, keys = LAYOUTS[layout]
    assert_same(run_ranks(train, size, blocks(name, parallel=keys), STEPS), alone(name))
    # The tolerance would show a row that attends otherwise: the first gradient norm is another one altogether.
    assert abs(alone(name)["curve"][0][1] / reference("masked_diffusion")["curve"][0][1] - 1) > 1e-2


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tensor2+sequence", "context2", *slow("pipeline2", "data2")])
def test_layouts_agree_within_documents(layout: str) -> None:
    size, keys = LAYOUTS[layout]
    config = blocks("blocks of 8", parallel=keys, data={"document_attention": "within_document"})
    expected = alone("blocks of 8", "within_document")
    assert_same(run_ranks(train, size, config, STEPS), expected)
    assert abs(expected["curve"][0][1] / alone("blocks of 8")["curve"][0][1] - 1) > 1e-2


@pytest.mark.distributed
def test_recomputed_layers_attend_as_before() -> None:
    config = blocks("with a causal clean half", train={"recompute": "full", "steps": 2 * (STEPS - 1)})
    assert_same(run_ranks(train, 1, config, STEPS), alone("with a causal clean half"))


@pytest.mark.distributed
def test_blocks_of_the_row_s_length_are_masked_diffusion_to_the_bit() -> None:
    config = variant(objective={"name": "block_diffusion", "block_size": LENGTH})
    ours, theirs = run_ranks(train, 1, config, STEPS)[0], reference("masked_diffusion")
    assert ours["curve"] == theirs["curve"]


def with_a_dense_mask(config: Config) -> tuple[list[Any], list[Any]]:
    """Loss, gradient norm and gradients of a step: ours, and with every pair of places behind one dense mask."""
    import torch

    from megatron_md.model import attention

    def dense(query: Any, key: Any, value: Any, rows: Any, attend: Any, scale: float) -> Any:
        """The definition, pair by pair, with nothing of ours but the shapes."""
        length, size = rows.length, rows.block_size
        place = np.arange(2 * length)
        is_noisy, block = place < length, place % length // size
        own, before = block[:, None] == block[None], block[None] < block[:, None]
        until = np.tril(np.ones((2 * length, 2 * length), dtype=bool))  # within the clean half, places are in order
        clean = before | (own & until) if config.objective.autoregressive_weight else before | own
        seen = np.where(
            is_noisy[:, None], np.where(is_noisy[None], own, before), np.where(is_noisy[None], False, clean)
        )
        heads = query.shape[2] // key.shape[2]
        keys, values = (x.repeat_interleave(heads, 2) for x in (key, value))
        scores = torch.einsum("lbhd,mbhd->bhlm", query, keys) * scale
        weights = scores.masked_fill(~torch.from_numpy(seen), float("-inf")).softmax(-1)
        return torch.einsum("bhlm,mbhd->lbhd", weights, values)

    def step() -> list[Any]:
        with small_run(config) as run:
            report = run.stepper.train(run.stepper.corrupt(run.batches(0)))
            gradients = [p.main_grad.clone() for chunk in run.chunks for p in chunk.parameters()]
            return [report.loss, report.grad_norm, [g.numpy() for g in gradients]]

    ours = step()
    with mock.patch.object(attention, "attend_in_blocks", dense):
        return ours, step()


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["blocks of 8", "with a causal clean half"])
def test_gradients_equal_those_of_a_dense_mask(name: str) -> None:
    ((ours, dense),) = run_ranks(with_a_dense_mask, 1, blocks(name))
    np.testing.assert_allclose(ours[:2], dense[:2], rtol=1e-6)
    for mine, theirs in zip(ours[2], dense[2], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    assert sum(np.abs(g).sum() for g in ours[2]) > 0


def leaks(config: Config) -> dict[str, bool]:
    """Whether a changed token of the second block changes losses in blocks before, in its own, and after."""
    with small_run(config) as run:
        (batch, *_) = run.batches(0)
        changed = replace(batch, tokens_BL=batch.tokens_BL.copy())
        corrupted = run.stepper.corrupt([batch])[0]
        # A clean token of the second block that is masked: nothing in the block may know it.
        masked = corrupted.positions_M[(corrupted.positions_M // 8 == 1)][0]
        changed.tokens_BL[0, masked] = 4 + (batch.tokens_BL[0, masked] + 1) % 200
        again = run.stepper.corrupt([changed])[0]
        (before,), (after,) = (run.inference.negative_log_likelihoods([b]) for b in (corrupted, again))
        other = corrupted.positions_M != masked
        differs = (before != after) & other
        block = corrupted.positions_M // 8  # of row 0: 0 to 3 in x_t
        return {"before": bool(differs[block <= 1].any()), "after": bool(differs[(block > 1) & (block < 4)].any()),
                "elsewhere": bool(differs[block >= 4].any())}  # fmt: skip


@pytest.mark.distributed
def test_a_masked_token_is_known_after_its_block_only() -> None:
    config = variant(blocks("blocks of 8"), objective={"mask_schedule": "point:0.5"})
    assert run_ranks(leaks, 1, config) == [{"before": False, "after": True, "elsewhere": False}]


def nelbos(config: Config) -> list[float]:
    """The exact NELBO per row of a model in blocks, over some passes."""
    from megatron_md.batch import BatchPosition
    from megatron_md.diffusion.estimators import Estimator
    from megatron_md.diffusion.nelbo import evaluate_nelbo
    from megatron_md.diffusion.scoring import ScoredRows
    from tests.small_run import MASK, clean_rows

    with small_run(config) as run:
        rows = clean_rows(np.arange(ROWS), BatchPosition(0, ROWS))
        scored = ScoredRows(rows.tokens_BL, rows.is_maskable_BL, cu_seqlens=rows.cu_seqlens)
        estimator = Estimator("exact", block_size=run.inference.block_size)
        values: list[float] = (
            evaluate_nelbo(run.inference, scored, estimator, mask_token_id=MASK, passes=2).values_PR().ravel().tolist()
        )
        return values


@pytest.mark.distributed
def test_the_nelbo_of_one_block_is_masked_diffusion_s_and_every_layout_has_the_same() -> None:
    whole = variant(objective={"name": "block_diffusion", "block_size": LENGTH})
    np.testing.assert_allclose(run_ranks(nelbos, 1, whole), run_ranks(nelbos, 1, variant()), rtol=1e-6)
    expected = run_ranks(nelbos, 1, blocks("blocks of 8"))[0]
    for layout in ("tensor2+sequence", "context2"):
        size, keys = LAYOUTS[layout]
        for found in run_ranks(nelbos, size, blocks("blocks of 8", parallel=keys)):
            np.testing.assert_allclose(found, expected, rtol=1e-5)

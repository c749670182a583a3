"""Adapters: the same numbers on every layout, nothing changed at the start, and nothing but adapters trained."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.config import LoraConfig, ResolvedConfig
from megatron_md.config.lora import is_adapter
from tests.model.test_dropout import losses
from tests.ranks import run_ranks
from tests.small_run import CONFIG, MASK, small_run, variant
from tests.train.test_step import LAYOUTS, assert_same, slow, train

STEPS = 4
KEYS = LoraConfig(rank=4, alpha=12.0)


def adapted(config: ResolvedConfig = CONFIG, keys: LoraConfig = KEYS, **sections: Any) -> ResolvedConfig:
    return replace(variant(config, **sections), lora=keys)


@cache
def reference(tied: bool = True) -> dict[str, Any]:
    """The single-process run that every layout must reproduce."""
    return run_ranks(train, 1, adapted(model={"tied": tied}), STEPS)[0]


NAMES = ("tensor2", "pipeline2-interleaved", "data2-overlap", "context2", "tensor2xpipeline2", "data2-plain")
LARGE = ("context2xtensor2+sequence", "pipeline2xdata2-overlap", "tensor2+sequence-xdata2", "padded-vocabulary")


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tensor2+sequence", *slow("pipeline2", *NAMES, *LARGE)])
def test_layouts_reproduce_one_process(name: str) -> None:
    size, layout = LAYOUTS[name]
    assert_same(run_ranks(train, size, adapted(parallel=layout), STEPS), reference())


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q", "fc2"], ["k"], ["v", "proj"], ["fc1"]])
def test_any_targets_on_split_layers(targets: list[Any]) -> None:
    keys = replace(KEYS, targets=targets)
    (expected,) = run_ranks(train, 1, adapted(keys=keys), STEPS)
    assert_same(run_ranks(train, 2, adapted(keys=keys, parallel=LAYOUTS["tensor2+sequence"][1]), STEPS), expected)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    assert_same(run_ranks(train, 1, adapted(train={"recompute": recompute}), STEPS), reference())


def started(config: ResolvedConfig) -> dict[str, Any]:
    """On a rank: logits with and without adapters, and what is trained and how it starts."""
    from megatron_md.checkpoint.replicas import compare
    from megatron_md.checkpoint.state import names_of_not_finite, optimizer_slices
    from megatron_md.model.build import build_model

    tokens_BL = torch.arange(4, 36).reshape(2, 16)
    with small_run(config) as run:
        before = {name: value.clone() for name, value in run.chunks[0].named_parameters()}
        (plain,) = build_model(replace(config, lora=None), run.world.device, causal=False, mask_token_id=MASK)
        (without,) = plain(tokens_BL, torch.arange(16).expand(2, -1), None).detach()[None]
        at_start = run.inference(tokens_BL)
        run.train(0, 2)
        after = run.inference(tokens_BL)
        compare(run.chunks, run.optimizer, 2)
        return {
            "same": torch.equal(without, at_start),
            "moved": (after - at_start).nan_to_num().abs().max().item(),
            "changed": sorted(n for n, value in run.chunks[0].named_parameters() if not torch.equal(value, before[n])),
            "adapters": sorted(name for name in before if is_adapter(name)),
            "first": {name: value for name, value in before.items() if name.endswith(("A_q", "B_q", "A_fc2"))},
            "optimized": sum(piece.tensors["exp_avg"].numel() for piece in optimizer_slices(run.optimizer)),
            "not_finite": names_of_not_finite(run.chunks, run.optimizer),
        }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_change_nothing_at_first_and_alone_are_trained(precision: str) -> None:
    config = adapted(train={"precision": precision}, parallel={"distributed_optimizer": True})
    (found,) = run_ranks(started, 1, config)
    assert found["same"] and found["moved"] > 1e-4
    assert found["changed"] == found["adapters"] and len(found["adapters"]) == 2 * 7 * config.model.layers
    assert found["optimized"] == config.model.layers * KEYS.layer_parameters(config.model)
    assert found["not_finite"] == []
    for name, value in found["first"].items():
        if "B_" in name:
            assert not value.any()
        else:
            expected = 1.0 / math.sqrt(3 * value.shape[1])
            assert value.float().std().item() == pytest.approx(expected, rel=4.0 / math.sqrt(2 * value.numel()))


def test_a_frozen_head_gets_no_gradient() -> None:
    from megatron_md.model.head import Prediction, masked_cross_entropy

    generator = torch.Generator().manual_seed(3)
    weight_VH = torch.randn(11, 6, generator=generator)
    hidden_MH = torch.randn(7, 6, generator=generator)
    prediction = Prediction(torch.arange(7), torch.arange(7), torch.linspace(0.5, 1.0, 7))
    found = []
    for is_frozen in (False, True):
        hidden, weight = hidden_MH.clone().requires_grad_(), weight_VH.clone().requires_grad_(not is_frozen)
        loss = masked_cross_entropy(
            hidden, weight, prediction, first_token=0, excluded=torch.tensor([10]), chunk=3, tp_group=None
        ).loss
        loss.backward()
        found.append((loss.item(), hidden.grad))
        assert (weight.grad is None) is is_frozen
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def dropped(config: ResolvedConfig, steps: tuple[int, ...]) -> list[float]:
    """On a rank: losses of steps with the dropout of their own, from one state of the weights."""
    from megatron_md.model.dropout import seed_dropout

    with small_run(config) as run:
        for name, parameter in run.chunks[0].named_parameters():
            if ".B_" in name:
                parameter.data.fill_(0.05)
        losses = []
        for step in steps:
            seed_dropout(config.seed, step * 8, run.world.data_rank)
            report = run.stepper.train(run.stepper.corrupt(run.batches(0)), lambda loss, norm: "only looked at")
            losses.append(report.loss)
        return losses


def test_dropout_follows_from_seed_and_step() -> None:
    config = adapted(keys=replace(KEYS, dropout=0.5))
    ((first, again, other, third),) = run_ranks(dropped, 1, config, (1, 1, 2, 1))
    assert first == again == third != other


@pytest.mark.slow
def test_dropout_keeps_tensor_parallel_ranks_alike() -> None:
    config = adapted(keys=replace(KEYS, dropout=0.5), parallel={"tensor": 2})
    one, two = run_ranks(losses, 2, config)
    assert one == two and np.isfinite(one).all()

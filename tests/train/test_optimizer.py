"""AdamW against torch's own, and the learning-rate shapes against their closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from megatron_md.config import LRScheduleConfig, OptimizerConfig
from megatron_md.train.optimizer import AdamW, learning_rate


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), (2, 2))]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_equals_torch_adamw() -> None:
    ours, theirs = parameters(), parameters()
    first = AdamW([{"params": ours[:2]}, {"params": ours[2:], "weight_decay": 0.0}], **SETTINGS)
    second = torch.optim.AdamW([{"params": theirs[:2]}, {"params": theirs[2:], "weight_decay": 0.0}], **SETTINGS)
    for step in range(5):
        set_gradients(ours, step), set_gradients(theirs, step)
        first.step(), second.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shared_step", [False, True])
def test_reload_continues_exactly_even_when_all_steps_are_one_tensor(shared_step: bool) -> None:
    params = parameters()
    optimizer = AdamW(params, **SETTINGS)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    saved, saved_params = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(params)
    if shared_step:  # what megatron-core's distributed optimizer does on a load
        common = torch.tensor(3.0)
        for state in saved["state"].values():
            state["step"] = common
    other = AdamW(saved_params, **SETTINGS)
    other.load_state_dict(saved)
    for step in range(3, 7):
        set_gradients(params, step), set_gradients(saved_params, step)
        optimizer.step(), other.step()
    for a, b in zip(params, saved_params, strict=True):
        assert torch.equal(a, b)


def test_torch_state_can_be_loaded() -> None:
    ours, theirs = parameters(), parameters()
    reference = torch.optim.AdamW(theirs, **SETTINGS)
    set_gradients(theirs, 0)
    reference.step()
    optimizer = AdamW(ours, **SETTINGS)
    exported = reference.state_dict()
    for group in exported["param_groups"]:
        group["step"] = 1
    optimizer.load_state_dict(exported)
    assert optimizer.param_groups[0]["step"] == 1
    assert all("step" not in state for state in optimizer.state.values())


def test_damaged_step_counts_are_refused() -> None:
    optimizer = AdamW(parameters(), **SETTINGS)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["step"] = torch.tensor(5.0)
    with pytest.raises(RuntimeError, match="different step counts"):
        optimizer.load_state_dict(state)


def keys(**schedule: object) -> OptimizerConfig:
    return OptimizerConfig(lr=1.0, lr_schedule=LRScheduleConfig(**schedule))  # type: ignore[arg-type]


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    shape = keys(name="constant", warmup_steps=4)
    assert [learning_rate(shape, s, 100) for s in (0, 1, 2, 3, 4, 99)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_passes_through_peak_middle_and_end() -> None:
    shape = keys(name="cosine", warmup_steps=10, min_lr=0.1)
    assert learning_rate(shape, 10, 110) == pytest.approx(1.0)
    assert learning_rate(shape, 60, 110) == pytest.approx(0.55)
    assert learning_rate(shape, 110, 110) == pytest.approx(0.1)
    assert learning_rate(shape, 35, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_flat_then_linear() -> None:
    shape = keys(name="wsd", warmup_steps=5, decay_steps=20, min_lr=0.2)
    assert learning_rate(shape, 79, 100) == 1.0
    assert learning_rate(shape, 90, 100) == pytest.approx(0.6)
    assert learning_rate(shape, 100, 100) == pytest.approx(0.2)


def test_piecewise_follows_lladas_shape() -> None:
    points = [(0.0, 4e-4), (0.5, 4e-4), (0.5, 1e-4), (0.9, 1e-4), (1.0, 1e-5)]
    shape = keys(name="piecewise", warmup_steps=10, points=points)
    assert learning_rate(shape, 4, 1000) == pytest.approx(2e-4)
    assert learning_rate(shape, 499, 1000) == pytest.approx(4e-4)
    assert learning_rate(shape, 500, 1000) == pytest.approx(1e-4)
    assert learning_rate(shape, 950, 1000) == pytest.approx(5.5e-5)
    assert learning_rate(shape, 1000, 1000) == pytest.approx(1e-5)

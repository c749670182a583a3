"""The example of a third-party schedule and objective, plugged in the way the trainer does it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_md.batch import BatchPosition, CleanBatch
from megatron_md.config import ObjectiveConfig
from megatron_md.diffusion.objective import build_objective
from megatron_md.diffusion.schedule import parse_schedule
from tests.diffusion.peer_vectors import vector

FOLDER = Path(__file__).parents[2] / "examples" / "plugin"
FRAGMENT: dict[str, Any] = yaml.safe_load((FOLDER / "plugin.yaml").read_text())


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    (name,) = FRAGMENT["imports"]
    return importlib.import_module(name)


def test_one_import_line_plugs_both_in(module: Any) -> None:
    objective = build_objective(ObjectiveConfig(**FRAGMENT["objective"]), seed=3, mask_token_id=50)
    assert isinstance(objective, module.ContextAdaptive) and objective.sharpness == 0.3
    tokens_BL = np.arange(64).reshape(4, 16) % 50
    batch = CleanBatch(tokens_BL, np.ones((4, 16), dtype=bool), np.arange(4), BatchPosition(0, 4))
    corrupted = objective.corrupt(batch)
    weights_BL = module.context_weights(corrupted.tokens_BL == 50, 0.3)
    np.testing.assert_allclose(corrupted.weights_M, weights_BL.reshape(-1)[corrupted.positions_M], rtol=1e-6)
    u_B = np.sort(np.arcsin(corrupted.mask_rate_B) * 2 / np.pi)
    np.testing.assert_array_equal(np.floor(u_B * 4), np.arange(4))
    assert set(objective.reduce(torch.ones(len(corrupted.targets_M)), corrupted)) == {"masked_ce", "mean_mask_rate"}


def test_bad_options_are_refused(module: Any) -> None:
    keys = {**FRAGMENT["objective"], "options": {"sharpness": 2}}
    with pytest.raises(ValueError, match=r"sharpness must lie in \(0, 1\)"):
        build_objective(ObjectiveConfig(**keys), seed=3, mask_token_id=50)


def test_schedule_is_a_distribution_and_takes_part_in_mixtures(module: Any) -> None:
    cosine = parse_schedule("cosine:0")
    t = np.linspace(0, 1, 101)
    np.testing.assert_allclose(cosine.cdf(t), 2 / np.pi * np.arcsin(t), atol=1e-9)
    assert cosine.mean() == pytest.approx(2 / np.pi, abs=1e-8)
    assert cosine.has_full_support() and not parse_schedule("cosine:0.2").has_full_support()
    components = [{"weight": 1, "schedule": "cosine:0"}, {"weight": 1, "schedule": {"name": "cosine", "lo": 0.5}}]
    mixture = parse_schedule({"name": "mixture", "components": components})
    u = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(mixture.cdf(mixture.inverse_cdf(u)), u, atol=1e-12)


def test_cosine_rate_and_weight_are_those_of_dllm(module: Any) -> None:
    case = vector("dllm_alpha_schedulers")
    expected = case["expected"]["cosine"]
    tau = np.array(case["inputs"]["t"])
    cosine = parse_schedule("cosine:0")
    t = cosine.inverse_cdf(tau)
    np.testing.assert_allclose(1 - t, expected["alpha"], atol=case["tol"])
    # Their weight is (dt/dtau) / (t + 1e-6), with t = 1 - alpha in fp32: an error of 6e-8 / t.
    np.testing.assert_allclose(
        1 / (cosine.density(t) * (t + 1e-6)), expected["weight"], rtol=1e-5 + 1e-7 / t.min(), atol=1e-6
    )


def test_context_weights_are_those_of_dllm(module: Any) -> None:
    case = vector("dllm_cart_weight")
    is_masked_BL = np.array(case["inputs"]["masked"], dtype=bool)
    for sharpness, expected in zip(case["inputs"]["p"], case["expected"], strict=True):
        np.testing.assert_allclose(module.context_weights(is_masked_BL, sharpness), expected, atol=case["tol"])

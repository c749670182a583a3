"""Bounds and greedy generations are the same on every layout, and sampling leaves training as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.diffusion.estimators import Estimator
from megatron_md.diffusion.nelbo import evaluate_nelbo
from megatron_md.diffusion.sampler import SamplerConfig, sample
from megatron_md.diffusion.scoring import ScoredRows
from tests.ranks import run_ranks
from tests.small_run import CONFIG, LENGTH, MASK, VOCAB, small_run, variant

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "virtual pipeline 2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "context 2 x pipeline 2": (4, {"context": 2, "pipeline": 2}),
}
GREEDY = SamplerConfig(LENGTH - 4, 14, 14)


def prompts() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(4, VOCAB, (3, 4)))


def look(layout: dict[str, Any]) -> tuple[torch.Tensor, list[list[int]], float]:
    """Logits of one canvas, greedy continuations, and the bound on some rows."""
    with small_run(variant(CONFIG, parallel=layout)) as run:
        run.train(0, 2)
        tokens_BL = torch.from_numpy(np.random.default_rng(1).integers(3, VOCAB, (2, LENGTH)))
        logits_BLV = run.inference(tokens_BL)
        greedy = sample(run.inference, prompts(), GREEDY, mask_token_id=MASK)
        tokens_RL = np.random.default_rng(2).integers(4, VOCAB, (12, LENGTH))
        rows = ScoredRows(tokens_RL, np.ones_like(tokens_RL, dtype=bool))
        table = evaluate_nelbo(run.inference, rows, Estimator("exact", 1), mask_token_id=MASK, passes=1)
        return logits_BLV, greedy.tokens_BL.tolist(), table.report().nelbo


@pytest.mark.distributed
def test_layouts_have_one_bound_and_one_greedy_text() -> None:
    reference, text, nelbo = run_ranks(look, 1, {})[0]
    assert reference.shape == (2, LENGTH, VOCAB) and (reference[..., MASK] == -torch.inf).all()
    assert len({tuple(row) for row in text}) == 3  # the prompts matter
    for name, (world_size, layout) in LAYOUTS.items():
        if world_size == 1:
            continue
        for logits_BLV, found, bound in run_ranks(look, world_size, layout):
            torch.testing.assert_close(logits_BLV, reference, rtol=1e-4, atol=1e-5, msg=name)
            assert found == text, name
            assert bound == pytest.approx(nelbo, rel=1e-5), name


def train(layout: dict[str, Any], between: bool) -> Any:
    """Losses of four steps, with or without a sample after the second."""
    with small_run(variant(CONFIG, parallel=layout)) as run:
        curve = run.train(0, 2)
        if between:
            config = SamplerConfig(LENGTH - 4, 7, strategy="random", temperature=1.0)
            sample(run.inference, prompts(), config, mask_token_id=MASK)
        assert all(chunk.training for chunk in run.chunks)
        return curve + run.train(2, 4)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["one process", "pipeline 2"])
def test_sampling_leaves_training_as_it_is(name: str) -> None:
    world_size, layout = LAYOUTS[name]
    assert run_ranks(train, world_size, layout, True) == run_ranks(train, world_size, layout, False)

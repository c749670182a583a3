"""Likelihoods of rows and of answers are the same on every layout; logits of a block, and the model's mode."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.batch import BatchPosition
from megatron_md.config import Config, ResolvedConfig
from megatron_md.model.build import build_model
from megatron_md.parallel import World
from megatron_md.train.inference import Inference
from tests.ranks import run_ranks
from tests.small_run import LENGTH, MASK, clean_rows, small_run, variant

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "data": (2, {}),
    "interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "context": (2, {"context": 2}),
    "context x data": (4, {"context": 2}),
}


def figures(config: Config) -> tuple[list[float], list[float]]:
    """(row values over two passes, log-likelihoods of answers) by the trainer's forward pass, on every rank."""
    from megatron_md.diffusion.conditional import ConditionalEstimator
    from megatron_md.diffusion.estimators import Estimator
    from megatron_md.diffusion.nelbo import evaluate_nelbo
    from megatron_md.diffusion.scoring import ScoredRows
    from megatron_md.evaluate.conditional import Question, conditional_log_likelihoods

    with small_run(config) as run:
        scorer = run.inference
        rows = clean_rows(np.arange(7), BatchPosition(0, 7))
        evaluated = ScoredRows(rows.tokens_BL, rows.is_maskable_BL)
        name: Any = "autoregressive" if scorer.causal else "complementary"
        table = evaluate_nelbo(scorer, evaluated, Estimator(name), mask_token_id=MASK, passes=2)
        text = rows.tokens_BL[0].tolist()
        questions = [Question(text[:3], (text[3:8], text[9:12], text[20:21])), Question(text[:6], (text[6:10],))]
        method: Any = "autoregressive" if scorer.causal else "monte_carlo"
        estimator = ConditionalEstimator(method, draws=6, minibatch=3)
        found = conditional_log_likelihoods(scorer, questions, estimator, mask_token_id=MASK, max_length=LENGTH)
        if not scorer.causal:
            guided = replace(estimator, guidance=0.7)
            found += conditional_log_likelihoods(scorer, questions, guided, mask_token_id=MASK, max_length=LENGTH)
        return table.values_PR().ravel().tolist(), [a.log_likelihood for answers in found for a in answers]


@cache
def reference(objective: str) -> tuple[list[float], list[float]]:
    return run_ranks(figures, 1, variant(objective={"name": objective}))[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "objective"),
    [
        ("tensor", "masked_diffusion"),
        ("pipeline", "masked_diffusion"),
        pytest.param("context", "autoregressive"),
        pytest.param("context x data", "masked_diffusion", marks=pytest.mark.slow),
        pytest.param("data", "masked_diffusion", marks=pytest.mark.slow),
        pytest.param("interleaved", "masked_diffusion", marks=pytest.mark.slow),
        pytest.param("pipeline", "autoregressive", marks=pytest.mark.slow),
    ],
)
def test_likelihoods_are_the_same_on_every_layout(layout: str, objective: str) -> None:
    size, keys = LAYOUTS[layout]
    for values, answers in run_ranks(figures, size, variant(objective={"name": objective}, parallel=keys)):
        np.testing.assert_allclose(values, reference(objective)[0], rtol=1e-5)
        np.testing.assert_allclose(answers, reference(objective)[1], rtol=1e-5)


@pytest.mark.parametrize("keys", [{}, {"right_shift": True}, {"name": "autoregressive"}], ids=str)
def test_the_head_computes_a_block_and_no_more(
    keys: dict[str, Any], small_config: ResolvedConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(small_config, objective=replace(small_config.objective, **keys))
    causal = "name" in keys
    chunks = build_model(config, world.device, causal=causal, mask_token_id=MASK)
    inference = Inference(config, world, chunks, causal=causal, mask_token_id=MASK)
    tokens_BL = torch.arange(4, 36).view(2, 16)
    whole_BLV, predicted, computed = inference(tokens_BL), chunks[0]._predicted, []
    monkeypatch.setattr(chunks[0], "_predicted", lambda logits: computed.append(logits.shape) or predicted(logits))
    for block in (slice(0, 4), slice(8, 16)):
        torch.testing.assert_close(inference.logits_of_block(tokens_BL, block), whole_BLV[:, block])
    assert computed == [(2 * 4, 101), (2 * 8, 101)]


@pytest.mark.parametrize("is_training", [True, False])
def test_the_mode_of_a_model_that_fails_while_it_is_looked_at_is_what_it_was(
    is_training: bool, small_config: Config, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = build_model(small_config, world.device, causal=False, mask_token_id=MASK)
    chunks[0].train(is_training)
    inference = Inference(small_config, world, chunks, causal=False, mask_token_id=MASK)
    visited = []
    monkeypatch.setattr(chunks[0].decoder, "train", lambda mode=True: visited.append(mode))
    assert inference(torch.arange(16)[None]).shape == (1, 16, 101)
    assert chunks[0].training is is_training
    assert visited == ([False, True] if is_training else []), "each change of mode is a walk through all modules"
    monkeypatch.undo()
    modes = []

    def failing(*args: Any, **keys: Any) -> None:
        modes.append((chunks[0].training, chunks[0].config.fp8))
        raise KeyError("planted")

    monkeypatch.setattr(chunks[0], "forward", failing)
    chunks[0].config.fp8 = "hybrid"  # whose kernels do not take rows of any length
    with pytest.raises(KeyError, match="planted"):
        inference(torch.arange(16)[None])
    assert modes == [(False, None)] and (chunks[0].training, chunks[0].config.fp8) == (is_training, "hybrid")

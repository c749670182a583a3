"""A bin's gradient is that of a training step in its window, the preconditioner AdamW's; the sketch keeps products."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.diffusion.fit import BINS
from megatron_md.evaluate.gradients import Sketch
from tests.ranks import run_ranks

GROUP, GROUPS, BIN = 4, 3, 7


def test_the_sketch_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = ([torch.randn(40, 30, generator=generator), torch.randn(500, generator=generator)] for _ in range(2))
    x[1] += y[1]
    exact = float(sum((a * b).sum() for a, b in zip(x, y, strict=True)))
    found = np.array([float(s(x) @ s(y)) for s in (Sketch(x, size=256, seed=seed) for seed in range(300))])
    scale = float(torch.cat([t.flatten() for t in x]).norm() * torch.cat([t.flatten() for t in y]).norm()) / 16
    assert abs(found.mean() - exact) < 4.0 * found.std() / np.sqrt(len(found))
    assert found.std() < 1.3 * scale
    assert torch.equal(Sketch(x, seed=3)(x), Sketch(x, seed=3)(x))


class Exact:
    """In place of a sketch: all of it."""

    def __init__(self, tensors: list[torch.Tensor], *, seed: int) -> None:
        self.size = sum(tensor.numel() for tensor in tensors)

    def __call__(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradients(run: str, data: str) -> dict[str, Any]:
    """In a rank: what the command would find, without sketch; and the norm of a training step in one bin's window."""
    from megatron_md import parallel
    from megatron_md.data.tokenizer import Tokenizer
    from megatron_md.diffusion.objective import build_objective
    from megatron_md.evaluate import gradients as module
    from megatron_md.evaluate.rows import TextFiles, evaluation_rows
    from megatron_md.run.saved import open_run

    saved = open_run(run)
    tokenizer = Tokenizer(saved.tokenizer)
    rows = evaluation_rows([data], [saved.config], tokenizer, count=GROUP * GROUPS, files=TextFiles())
    sketch, module.Sketch = module.Sketch, Exact  # type: ignore[misc, assignment]
    try:
        with parallel.session(saved.config) as world:
            found = module.gradients_by_rate(saved, world, tokenizer, rows, group=GROUP)
            keys = replace(saved.config.objective, mask_schedule=f"uniform:{BIN / BINS},{(BIN + 1) / BINS}")
            train = replace(saved.config.train, micro_batch_size=GROUP, global_batch_size=GROUP * GROUPS)
            config = replace(saved.config, seed=0, objective=keys, train=train)
            stepper = module._load(replace(saved, config=config), world, tokenizer.mask_token_id)
            parameters, scales = module._preconditioner(config, stepper)
            stepper.objective = build_objective(keys, seed=0, mask_token_id=tokenizer.mask_token_id)
            clean = [
                module._clean(rows, np.arange(k * GROUP, (k + 1) * GROUP)) for k in range(GROUPS)
            ]  # one global batch
            report = stepper.train(stepper.corrupt(clean), lambda loss, norm: "only measured")
            whole = Exact(scales, seed=0)([p.main_grad.float() * s for p, s in zip(parameters, scales, strict=True)])
            magnitudes = torch.cat([(scale.double() ** -2 - config.optimizer.eps).reshape(-1) for scale in scales])
            return {
                "found": found,
                "step": whole.numpy(),
                "loss": report.loss,
                "adam_norm": float(magnitudes.norm()),
                "maskable": rows.maskable_R,
            }
    finally:
        module.Sketch = sketch  # type: ignore[misc]


@pytest.fixture(scope="module")
def figures(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tests.train.test_trainer import pretrain
    from tests.trained_run import run_config

    config = run_config(trained, "one_step")
    run_ranks(pretrain, 1, replace(config, train=replace(config.train, steps=1)))
    (found,) = run_ranks(gradients, 1, str(trained / "one_step"), str(trained / "valid"))
    record = json.loads((trained / "one_step/metrics.jsonl").read_text().splitlines()[-1])
    return {**found, "logged_norm": record["grad_norm"]}


def test_a_bins_gradient_is_that_of_a_training_step_in_its_window(figures: dict[str, Any]) -> None:
    found, share_K = figures["found"], figures["maskable"].reshape(GROUPS, GROUP).sum(axis=1)
    mean_D = np.average(found.gradients_AKD[BIN], axis=0, weights=share_K)
    np.testing.assert_allclose(mean_D, figures["step"], atol=1e-5 * np.abs(figures["step"]).max())
    loss = np.average(found.loss_AR[BIN], weights=figures["maskable"])
    assert loss == pytest.approx(figures["loss"], rel=1e-5)
    assert found.step == 1 and np.all(found.loss_AR >= 0.0) and np.ptp(found.loss_AR) > 1.0


def test_the_preconditioner_is_adams(figures: dict[str, Any]) -> None:
    """After one step exp_avg_sq / (1 - beta2) is the squared (clipped) gradient, whose norm was logged."""
    assert figures["adam_norm"] == pytest.approx(min(1.0, figures["logged_norm"]), rel=1e-4)

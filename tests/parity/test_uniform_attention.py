"""The model of appendix F.1: what it can tell apart, its loss, and that it learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_md.batch import BatchPosition
from megatron_md.data.stream import micro_batches
from megatron_md.diffusion.objective import build_objective
from megatron_md.parity.config import MASK_TOKEN_ID, ParityConfig
from megatron_md.parity.experiment import run_experiment
from megatron_md.parity.task import ParityStream, ParityTask
from megatron_md.parity.uniform_attention import UniformAttentionModel, UniformAttentionStepper
from tests.parity.parity_config import small


def stepper(config: ParityConfig) -> UniformAttentionStepper:
    return UniformAttentionStepper(
        config, build_objective(config.objective, seed=config.seed, mask_token_id=MASK_TOKEN_ID)
    )


def test_one_output_for_all_masked_positions_from_the_sum_of_embeddings() -> None:
    model = UniformAttentionModel(length=5, hidden=16, layers=2, seed=1)
    tokens = torch.tensor([[0, 1, 2, 2, 0], [1, 0, 2, 2, 0]])
    logits = model(tokens)
    assert logits.shape == (2,) and logits[0] != logits[1]
    # The first layer sees one-hot vectors of (position, token): their sum over positions, times the weight.
    weight, bias = model.mlp[0].weight, model.mlp[0].bias
    summed = torch.stack([weight[:, 3 * i + int(tokens[0, i])] for i in range(5)]).sum(dim=0) + bias
    torch.testing.assert_close(
        model.mlp[1:](torch.relu(summed)[None])[0, 0],
        model.mlp[1:](model.mlp[0](torch.nn.functional.one_hot(tokens[:1], 3).flatten(1).float()))[0, 0],
    )


def test_the_step_minimises_the_objectives_loss() -> None:
    config = small(denoiser="uniform_attention", optimizer={"lr": 0.05, "clip_grad": 0.0, "weight_decay": 0.0})
    this = stepper(config)
    rows = micro_batches(ParityStream(ParityTask.of(config), seed=1), BatchPosition(0, 16), 4, data_rank=0, data_size=1)
    batches = this.corrupt(rows)
    (before,) = (
        sum(float(b.weights_M @ nll) for b, nll in zip(batches, this.negative_log_likelihoods(batches), strict=True))
        for _ in range(1)
    )
    report = this.train(batches)
    assert report.loss == pytest.approx(before / sum(b.denominator for b in batches), rel=1e-5)
    gradient = math.sqrt(sum(float((p.grad**2).sum()) for p in this.model.parameters() if p.grad is not None))
    assert report.grad_norm == pytest.approx(gradient, rel=1e-5)
    later = [this.train(batches).loss for _ in range(100)]
    assert later[-1] < report.loss - 0.1


def test_weight_decay_spares_biases() -> None:
    groups = stepper(small(denoiser="uniform_attention")).optimizer.param_groups
    assert all(p.dim() == 2 for p in groups[0]["params"]) and groups[0].get("wd_mult", 1.0) == 1.0
    assert all(p.dim() == 1 for p in groups[1]["params"]) and groups[1]["wd_mult"] == 0.0


def test_micro_batches_do_not_change_the_step() -> None:
    reports = []
    for size in (16, 4):
        config = small(denoiser="uniform_attention", train={"micro_batch_size": size})
        rows = micro_batches(
            ParityStream(ParityTask.of(config), seed=1), BatchPosition(0, 16), size, data_rank=0, data_size=1
        )
        this = stepper(config)
        reports.append(this.train(this.corrupt(rows)))
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-6)
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-5)
    for name, value in reports[0].metrics.items():
        assert value == pytest.approx(reports[1].metrics[name], rel=1e-6), name


def test_initial_weights_come_from_the_seed_and_disturb_no_other() -> None:
    state = torch.random.get_rng_state()
    first, second, other = (UniformAttentionModel(6, 8, 1, seed).mlp[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_records_of_a_run(tmp_path: Path) -> None:
    summary = run_experiment(small(tmp_path, denoiser="uniform_attention"))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["signal_loss"] + record["noise_loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert ("valid_accuracy" in record) == (record["step"] % 2 == 0)
    assert {"train_accuracy", "valid_accuracy", "weight_norm", "signal_probability"} <= records[3].keys()
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["status"] == "finished" and summary["step"] == 4 and np.isfinite(summary["largest_gap"])


def test_records_follow_a_curriculums_signal_probability(tmp_path: Path) -> None:
    stages = [{"until": 0.5, "schedule": "point:0.25"}, {"until": 1, "schedule": "uniform:0,1"}]
    schedule = {"name": "curriculum", "stages": stages}
    summary = run_experiment(small(tmp_path, denoiser="uniform_attention", objective={"mask_schedule": schedule}))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # k = 2: 3 t (1 - t)^2 at t = 1/4, and 1 / (k + 2) on the full range.
    assert [record["signal_probability"] for record in records] == pytest.approx([27 / 64] * 2 + [1 / 4] * 2)
    assert summary["signal_probability"] == pytest.approx(27 / 64)

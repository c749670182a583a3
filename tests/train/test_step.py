"""Layout equivalence: however a global batch is split, loss, gradient norm and updated weights are the same."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

from megatron_md.batch import BatchPosition, CleanBatch
from megatron_md.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig, TrainConfig

ROWS, LENGTH, VOCAB, MASK = 8, 32, 211, 3
STEPS = 5

CONFIG = Config(
    model=ModelConfig(vocab=VOCAB, max_length=LENGTH, layers=4, hidden=64, heads=4, kv_heads=2, ffn=96),
    data=DataConfig(seq_length=LENGTH),
    objective=ObjectiveConfig(mask_schedule="uniform:0.3,0.7", head_chunk=16),
    optimizer=OptimizerConfig(lr=1e-3),
    train=TrainConfig(global_batch_size=ROWS, micro_batch_size=2),
)

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor2": (2, {"tensor": 2}),
    "tensor2+sequence": (2, {"tensor": 2, "sequence_parallel": True}),
    "pipeline2": (2, {"pipeline": 2}),
    "pipeline2-uneven": (2, {"pipeline": 2, "first_stage_layers": 1}),
    "pipeline2-interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "data2-plain": (2, {"distributed_optimizer": False}),
    "data2": (2, {}),
    "data2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tensor2xpipeline2": (4, {"tensor": 2, "pipeline": 2}),
    "tensor2+sequence-xdata2": (4, {"tensor": 2, "sequence_parallel": True}),
    "padded-vocabulary": (2, {"tensor": 2, "vocab_multiple": 64}),
}


def clean_rows(index: np.ndarray[Any, Any], position: BatchPosition) -> CleanBatch:
    """Rows that are a function of their number; some end in padding, one in each batch has nothing to mask."""
    tokens = np.stack([np.random.default_rng(int(g)).integers(4, VOCAB, LENGTH) for g in index])
    is_maskable = np.arange(LENGTH)[None] < np.where(index % 8 == 5, 0, LENGTH - index % 3)[:, None]
    return CleanBatch(tokens, is_maskable, index, position)


def train(config: Config, steps: int) -> dict[str, Any]:
    """Train on made-up rows; returns per-step figures and a layout-free digest of the final weights."""
    from megatron_md import parallel
    from megatron_md.diffusion.objective import build_objective
    from megatron_md.model.build import build_model, settled_parameters, wrap_data_parallel
    from megatron_md.train.optimizer import build_optimizer, set_hyperparameters
    from megatron_md.train.step import Stepper

    with parallel.session(config) as world:
        objective = build_objective(config.objective, seed=config.seed, mask_token_id=MASK)
        model = build_model(config, world.device, causal=objective.causal, mask_token_id=MASK)
        chunks = wrap_data_parallel(model, config)
        optimizer = build_optimizer(config, chunks)
        set_hyperparameters(optimizer, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)
        stepper = Stepper(config, world, chunks, optimizer, objective)
        size, curve = config.train.micro_batch_size, []
        for step in range(steps):
            position = BatchPosition(step * ROWS, ROWS, step / steps)
            slots = np.arange(ROWS).reshape(-1, world.data_size, size)[:, world.data_rank] + step * ROWS
            report = stepper.train(stepper.corrupt([clean_rows(index, position) for index in slots]))
            curve.append((report.loss, report.grad_norm, report.metrics["masked_ce"], report.metrics["mean_mask_rate"]))
        with settled_parameters(chunks):
            return {"curve": curve, "shards": shards(chunks)}


def shards(chunks: list[Any]) -> list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray[Any, Any]]]:
    """This rank's pieces of the weights: (global name, global shape, offset, values)."""
    from megatron_md.model.build import state_dict_metadata
    from megatron_md.model.initialize import sharded_tensors

    pieces = []
    for chunk in chunks:
        for shard in sharded_tensors(chunk.module.sharded_state_dict(metadata=state_dict_metadata())):
            axes = shard.prepend_axis_num
            data = shard.data.detach().float().numpy().reshape((1,) * axes + tuple(shard.data.shape))
            pieces.append((shard.key, shard.global_shape, shard.global_offset, data))
    return pieces


def assemble(runs: list[dict[str, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Whole weights by global name, vocabulary padding cut off."""
    whole: dict[str, np.ndarray[Any, Any]] = {}
    for run in runs:
        for name, shape, offset, data in run["shards"]:
            target = whole.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
            target[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data
    return {name: value[:VOCAB] if "embedding" in name or "output_layer" in name else value for name, value in whole.items()}


@cache
def reference(objective: str, tied: bool = True) -> dict[str, Any]:
    """The single-process run that every layout must reproduce."""
    return run_ranks(train, 1, variant(objective, tied), STEPS)[0]


def variant(objective: str, tied: bool = True) -> Config:
    return replace(
        CONFIG,
        objective=replace(CONFIG.objective, name=objective),
        model=replace(CONFIG.model, tied=tied),
        parallel=ParallelConfig(distributed_optimizer=False),
    )


def assert_same(runs: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for run in runs:
        np.testing.assert_allclose(run["curve"], expected["curve"], rtol=1e-5)
        assert run["curve"] == runs[0]["curve"], "ranks disagree about the global figures"
    weights, expected_weights = assemble(runs), assemble([expected])
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        # Adam divides by the gradient's size: where that is rounding noise, an update of lr may flip its sign.
        np.testing.assert_allclose(value, expected_weights[name], rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("objective", ["masked_diffusion", "autoregressive"])
def test_layout_reproduces_one_process(name: str, objective: str) -> None:
    size, layout = LAYOUTS[name]
    config = replace(variant(objective), parallel=ParallelConfig(**layout))
    runs = run_ranks(train, size, config, STEPS)
    assert_same(runs, reference(objective))


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tensor2", "pipeline2", "tensor2xpipeline2"])
def test_untied_embeddings_too(name: str) -> None:
    size, layout = LAYOUTS[name]
    config = replace(variant("masked_diffusion", tied=False), parallel=ParallelConfig(**layout))
    runs = run_ranks(train, size, config, STEPS)
    assert_same(runs, reference("masked_diffusion", tied=False))


@pytest.mark.distributed
@pytest.mark.parametrize("micro_batch", [1, 4, 8])
@pytest.mark.parametrize("objective", ["masked_diffusion", "autoregressive"])
def test_micro_batches_do_not_matter(micro_batch: int, objective: str) -> None:
    config = variant(objective)
    config = replace(config, train=replace(config.train, micro_batch_size=micro_batch))
    runs = run_ranks(train, 1, config, STEPS)
    assert_same(runs, reference(objective))


@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: Any) -> None:
    config = variant("masked_diffusion")
    config = replace(config, train=replace(config.train, recompute=recompute))
    assert_same(run_ranks(train, 1, config, STEPS), reference("masked_diffusion"))


@pytest.mark.distributed
def test_every_normalisation_is_a_global_count() -> None:
    for normalise in ("masked", "sequences"):
        config = variant("masked_diffusion")
        config = replace(config, objective=replace(config.objective, normalise=normalise))
        single = run_ranks(train, 1, config, 2)[0]
        double = run_ranks(train, 2, config, 2)
        assert_same(double, single)


@pytest.mark.distributed
def test_bf16_follows_fp32() -> None:
    config = variant("masked_diffusion")
    config = replace(config, train=replace(config.train, precision="bf16"))
    curve = np.array(run_ranks(train, 1, config, STEPS)[0]["curve"])
    np.testing.assert_allclose(curve[:, 0], np.array(reference("masked_diffusion")["curve"])[:, 0], rtol=2e-2)
    assert not np.array_equal(curve[:, 0], np.array(reference("masked_diffusion")["curve"])[:, 0])

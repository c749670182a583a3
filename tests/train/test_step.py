"""Layout equivalence: however a global batch is split, loss, gradient norm and updated weights are the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from megatron_md.config import Config
from tests.ranks import run_ranks
from tests.small_run import CONFIG, VOCAB, small_run, variant

STEPS = 5

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# Processes and layout; all with the distributed optimizer except where it says so.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "distributed-optimizer-alone": (1, {}),
    "tensor2": (2, {"tensor": 2}),
    "tensor2+sequence": (2, {"tensor": 2, "sequence_parallel": True}),
    "pipeline2": (2, {"pipeline": 2}),
    "pipeline2-uneven": (2, {"pipeline": 2, "first_stage_layers": 1}),
    "pipeline2-interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "data2-plain": (2, {"distributed_optimizer": False}),
    "data2": (2, {}),
    "data2-overlap": (2, OVERLAP),
    "tensor2xpipeline2": (4, {"tensor": 2, "pipeline": 2}),
    "tensor2+sequence-xdata2": (4, {"tensor": 2, "sequence_parallel": True}),
    "pipeline2xdata2-overlap": (4, {"pipeline": 2, **OVERLAP}),
    "interleaved-xdata2-overlap": (4, {"pipeline": 2, "virtual_pipeline": 2, **OVERLAP}),
    "padded-vocabulary": (2, {"tensor": 2, "vocab_multiple": 64}),
}
LAYOUTS = {name: (size, {"distributed_optimizer": True, **layout}) for name, (size, layout) in LAYOUTS.items()}


def train(config: Config, steps: int) -> dict[str, Any]:
    """Train on made-up rows; returns per-step figures and this rank's pieces of the final weights."""
    from megatron_md.model.build import settled_parameters

    with small_run(config) as run:
        curve = run.train(0, steps)
        with settled_parameters(run.chunks):
            return {"curve": curve, "shards": shards(run.chunks)}


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
    return {
        name: value[:VOCAB] if "embedding" in name or "output_layer" in name else value for name, value in whole.items()
    }


@cache
def reference(objective: str, tied: bool = True) -> dict[str, Any]:
    """The single-process run that every layout must reproduce."""
    return run_ranks(train, 1, variant(objective={"name": objective}, model={"tied": tied}), STEPS)[0]


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
    runs = run_ranks(train, size, variant(objective={"name": objective}, parallel=layout), STEPS)
    assert_same(runs, reference(objective))


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tensor2", "pipeline2", "tensor2xpipeline2", "data2-overlap"])
def test_untied_embeddings_too(name: str) -> None:
    size, layout = LAYOUTS[name]
    runs = run_ranks(train, size, variant(model={"tied": False}, parallel=layout), STEPS)
    assert_same(runs, reference("masked_diffusion", tied=False))


@pytest.mark.distributed
@pytest.mark.parametrize("micro_batch", [1, 4, 8])
@pytest.mark.parametrize("objective", ["masked_diffusion", "autoregressive"])
def test_micro_batches_do_not_matter(micro_batch: int, objective: str) -> None:
    config = variant(objective={"name": objective}, train={"micro_batch_size": micro_batch})
    assert_same(run_ranks(train, 1, config, STEPS), reference(objective))


@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    assert_same(run_ranks(train, 1, variant(train={"recompute": recompute}), STEPS), reference("masked_diffusion"))


@pytest.mark.distributed
@pytest.mark.parametrize("normalise", ["masked", "sequences"])
def test_every_normalisation_is_a_global_count(normalise: str) -> None:
    config = variant(objective={"normalise": normalise})
    assert_same(run_ranks(train, 2, config, 2), run_ranks(train, 1, config, 2)[0])


@pytest.mark.distributed
def test_bf16_follows_fp32() -> None:
    losses = np.array(run_ranks(train, 1, variant(train={"precision": "bf16"}), STEPS)[0]["curve"])[:, 0]
    expected = np.array(reference("masked_diffusion")["curve"])[:, 0]
    np.testing.assert_allclose(losses, expected, rtol=2e-2)
    assert not np.array_equal(losses, expected)


def train_with_a_nan(config: Config) -> dict[str, Any]:
    """Two steps, the first with a weight that is not a number on one rank's last micro-batch."""
    import torch

    with small_run(config) as run:
        before = [parameter.detach().clone() for chunk in run.chunks for parameter in chunk.parameters()]
        batches = run.stepper.corrupt(run.batches(0))
        if run.world.data_rank == 0:
            batches[-1].weights_M[0] = float("nan")
        bad = run.stepper.train(batches)
        after = [parameter.detach().clone() for chunk in run.chunks for parameter in chunk.parameters()]
        unchanged = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        good = run.stepper.train(run.stepper.corrupt(run.batches(1)))
        return {"skipped": bad.skipped, "unchanged": unchanged, "then": good.skipped, "loss": good.loss}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"distributed_optimizer": True}])
def test_a_nan_is_skipped_by_all_ranks_and_poisons_nothing(layout: dict[str, Any]) -> None:
    for rank in run_ranks(train_with_a_nan, 2, variant(parallel=layout)):
        assert rank["skipped"] and rank["unchanged"] and not rank["then"] and np.isfinite(rank["loss"])


def weight_decays(config: Config) -> dict[str, float]:
    """Weight decay that each parameter's group carries, by the parameter's name."""
    with small_run(config) as run:
        names = {id(p): name for chunk in run.chunks for name, p in chunk.named_parameters()}
        return {names[id(p)]: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}


@pytest.mark.distributed
def test_norms_and_biases_are_not_decayed() -> None:
    (decays,) = run_ranks(weight_decays, 1, variant(model={"qkv_bias": True, "qk_norm": True}))
    assert any("bias" in name for name in decays) and any("q_layernorm" in name for name in decays)
    for name, decay in decays.items():
        assert decay == (0.0 if "norm" in name or name.endswith("bias") else CONFIG.optimizer.weight_decay), name


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["data2-overlap", "pipeline2", "tensor2xpipeline2"])
def test_a_micro_batch_without_anything_to_predict(name: str) -> None:
    # Micro-batches of one row: row 5 has nothing to mask, and the number of head chunks varies from one to the next.
    size, layout = LAYOUTS[name]
    runs = run_ranks(train, size, variant(train={"micro_batch_size": 1}, parallel=layout), STEPS)
    assert_same(runs, reference("masked_diffusion"))

"""Layout equivalence: however a global batch is split, loss, gradient norm and updated weights are the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from megatron_md.config import Config
from tests.ranks import run_ranks
from tests.small_run import CONFIG, LENGTH, VOCAB, small_run, variant

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
    "context2": (2, {"context": 2}),
    "context4": (4, {"context": 4}),
    "context2xtensor2": (4, {"context": 2, "tensor": 2}),
    "context2xtensor2+sequence": (4, {"context": 2, "tensor": 2, "sequence_parallel": True}),
    "context2xpipeline2": (4, {"context": 2, "pipeline": 2}),
    "context2xpipeline2-interleaved": (4, {"context": 2, "pipeline": 2, "virtual_pipeline": 2}),
    "context2xdata2-overlap": (4, {"context": 2, **OVERLAP}),
    "padded-vocabulary": (2, {"tensor": 2, "vocab_multiple": 64}),
}
LAYOUTS = {name: (size, {"distributed_optimizer": True, **layout}) for name, (size, layout) in LAYOUTS.items()}


def slow(*values: Any) -> list[Any]:
    """Values of a parameter whose tests run with the slow ones."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


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
            data = shard.data.detach().float().cpu().numpy().reshape((1,) * axes + tuple(shard.data.shape))
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
def reference(objective: str, tied: bool = True, document_attention: str = "full") -> dict[str, Any]:
    """The single-process run that every layout must reproduce."""
    data = {"document_attention": document_attention}
    return run_ranks(train, 1, variant(objective={"name": objective}, model={"tied": tied}, data=data), STEPS)[0]


def assert_same(runs: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for run in runs:
        np.testing.assert_allclose(run["curve"], expected["curve"], rtol=1e-5)
        assert run["curve"] == runs[0]["curve"], "ranks disagree about the global figures"
    weights, expected_weights = assemble(runs), assemble([expected])
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        # Adam divides by the gradient's size: where that is rounding noise, an update of lr may flip its sign.
        np.testing.assert_allclose(value, expected_weights[name], rtol=1e-4, atol=2e-5, err_msg=name)


# The layouts know nothing of the objective: where the causal spec meets a split of its own, it is run by default.
CAUSAL = ("tensor2+sequence", "pipeline2-interleaved", "tensor2xpipeline2", "context2")
# What these would show, larger layouts show as well.
COVERED = (
    "context2xtensor2",
    "context2xpipeline2-interleaved",
    "context2xpipeline2",
    "context2xdata2-overlap",
    "data2",
)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        *(
            pytest.param(name, "masked_diffusion", marks=pytest.mark.slow if name in COVERED else ())
            for name in LAYOUTS
        ),
        *(pytest.param(name, "autoregressive", marks=() if name in CAUSAL else pytest.mark.slow) for name in LAYOUTS),
    ],
)
def test_layout_reproduces_one_process(name: str, objective: str) -> None:
    size, layout = LAYOUTS[name]
    runs = run_ranks(train, size, variant(objective={"name": objective}, parallel=layout), STEPS)
    assert_same(runs, reference(objective))


def norms(config: Config) -> tuple[float, float, int]:
    """On a rank: the reported gradient norm, megatron-core's own of the same gradients, reductions over the world."""
    from unittest import mock

    import torch.distributed as dist

    with small_run(config) as run:
        batches = run.stepper.corrupt(run.batches(0))
        with (
            mock.patch.object(run.optimizer, "step_with_ready_grads"),
            mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reductions,
        ):
            report = run.stepper.train(batches)
        over_all = [call for call in reductions.call_args_list if call.kwargs.get("group") is None]
        return report.grad_norm, float(run.optimizer.get_grad_norm()), len(over_all)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["data2-plain", "tensor2", *slow("pipeline2xdata2-overlap")])
def test_the_gradient_norm_travels_with_the_other_figures(name: str) -> None:
    size, layout = LAYOUTS[name]
    # Without clipping the gradients stay what they were when the norm was taken.
    for ours, core, reductions in run_ranks(norms, size, variant(parallel=layout, optimizer={"clip_grad": 0.0})):
        assert ours == pytest.approx(core, rel=1e-6)
        assert reductions == 1


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tensor2xpipeline2", *slow("tensor2", "pipeline2", "data2-overlap", "context2")])
def test_untied_embeddings_too(name: str) -> None:
    size, layout = LAYOUTS[name]
    runs = run_ranks(train, size, variant(model={"tied": False}, parallel=layout), STEPS)
    assert_same(runs, reference("masked_diffusion", tied=False))


@pytest.mark.distributed
@pytest.mark.parametrize("micro_batch", [1, *slow(4), 8])
@pytest.mark.parametrize("objective", ["masked_diffusion", *slow("autoregressive")])
def test_micro_batches_do_not_matter(micro_batch: int, objective: str) -> None:
    config = variant(objective={"name": objective}, train={"micro_batch_size": micro_batch})
    assert_same(run_ranks(train, 1, config, STEPS), reference(objective))


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
        return {
            "skipped": bad.fault is not None,
            "unchanged": unchanged,
            "then": good.fault is not None,
            "loss": good.loss,
        }


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {"context": 2}, {"distributed_optimizer": True}])
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
@pytest.mark.parametrize("name", ["data2-overlap", *slow("pipeline2", "context4"), "tensor2xpipeline2"])
def test_a_micro_batch_without_anything_to_predict(name: str) -> None:
    # Micro-batches of one row: row 5 has nothing to mask, and the number of head chunks varies from one to the next.
    size, layout = LAYOUTS[name]
    runs = run_ranks(train, size, variant(train={"micro_batch_size": 1}, parallel=layout), STEPS)
    assert_same(runs, reference("masked_diffusion"))


def shifted_losses(config: Config) -> list[Any]:
    """On each rank: the nll of a step's batches, and what the raw outputs one to the left say."""
    import torch

    with small_run(config) as run:
        batches = run.stepper.corrupt(run.batches(0))
        losses = run.inference.negative_log_likelihoods(batches)
        expected = []
        for batch in batches:
            assert (batch.positions_M % LENGTH > 0).all()
            with torch.no_grad():
                tokens_BL = torch.from_numpy(batch.tokens_BL)
                positions_BL = torch.arange(LENGTH).expand_as(tokens_BL)
                logits_BLV = run.chunks[0].module.eval()(tokens_BL, positions_BL, None)
            log_probability_NV = logits_BLV.log_softmax(-1).flatten(0, 1)
            expected.append(-log_probability_NV[batch.positions_M - 1, batch.targets_M])
        return [(nll_M, other.numpy()) for nll_M, other in zip(losses or [], expected, strict=True)]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["masked_diffusion", *slow("autoregressive")])
def test_right_shift_reads_the_output_one_to_the_left(name: str) -> None:
    config = variant(CONFIG, objective={"name": name, "right_shift": True})
    (pairs,) = run_ranks(shifted_losses, 1, config)
    assert len(pairs) == 4
    for nll_M, expected_M in pairs:
        np.testing.assert_allclose(nll_M, expected_M, rtol=1e-5)
    curve = run_ranks(train_curve, 1, config, 3)[0]
    for size, layout in (LAYOUTS[name] for name in ("tensor2+sequence", "pipeline2", "context2")):
        np.testing.assert_allclose(
            run_ranks(train_curve, size, variant(config, parallel=layout), 3)[-1], curve, rtol=1e-5
        )
    assert curve[0][0] != pytest.approx(
        run_ranks(train_curve, 1, variant(CONFIG, objective={"name": name}), 1)[0][0][0]
    )


def train_curve(config: Config, steps: int) -> Any:
    with small_run(config) as run:
        return run.train(0, steps)


def bucketed(config: Config, bucket: int) -> tuple[list[Any], set[int]]:
    """On a rank: the figures of steps whose predicted positions are filled up, and by how many the head saw."""
    from megatron_md.model import build

    seen = set()
    original = build.masked_cross_entropy

    def recorded(hidden_MH: Any, *words: Any, **keys: Any) -> Any:
        seen.add(len(hidden_MH))
        return original(hidden_MH, *words, **keys)

    build.masked_cross_entropy = recorded
    with small_run(config) as run:
        run.stepper.bucket = bucket
        return run.train(0, STEPS), seen


@pytest.mark.distributed
@pytest.mark.parametrize("right_shift", [False, True])
def test_filling_up_predicted_positions_changes_nothing(right_shift: bool) -> None:
    config = variant(objective={"right_shift": right_shift})
    ((expected, counts),), ((got, filled),) = (run_ranks(bucketed, 1, config, bucket) for bucket in (1, 24))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert any(count % 24 for count in counts) and not any(count % 24 for count in filled)


def cycles(config: Config) -> list[str]:
    """On a rank: types of what two steps leave to the garbage collector."""
    import gc

    with small_run(config) as run:
        run.train(0, 2)
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        run.train(2, 4)
        gc.collect()
        return [type(found).__name__ for found in gc.garbage]


@pytest.mark.distributed
@pytest.mark.parametrize("keys", [{"parallel": OVERLAP}, {"train": {"recompute": "full"}}], ids=str)
def test_a_step_leaves_nothing_to_the_garbage_collector(keys: dict[str, Any]) -> None:
    """Between two collections, `train.gc_every` steps apart, tensors in cycles would pile up on the device."""
    assert run_ranks(cycles, 1, variant(**{"parallel": {"distributed_optimizer": True}} | keys)) == [[]]

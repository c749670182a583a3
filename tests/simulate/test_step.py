"""The simulated step of many layouts: memory against the closed forms of `--dry-run`, FLOPs and traffic against theory.

All of them are simulated at once, since importing torch takes longer than most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from megatron_md.config import ResolvedConfig, config_from_mapping, resolve
from megatron_md.run.check import Layout, check_config
from megatron_md.run.estimate import layer_matrices, memory_per_rank, training_flops_per_token
from megatron_md.simulate.children import simulate
from megatron_md.simulate.guard import compiler
from megatron_md.simulate.stage import KINDS, UPDATE, Stage

SPLIT = {"tensor": 2, "sequence_parallel": True}
OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
EIGHT_B: dict[str, Any] = {
    "model": {"preset": "8b"}, "data": {"seq_length": 4096}, "objective": {"head_chunk": 4096},
    "parallel": {"tensor": 4, "sequence_parallel": True, "vocab_multiple": 128, **OVERLAPPED},
    "train": {"global_batch_size": 4, "micro_batch_size": 1},
}  # fmt: skip
# World size, and what differs from the small model below.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tensor and data": (4, {"parallel": {**SPLIT, **OVERLAPPED}}),
    "tensor without sequence": (2, {"parallel": {"tensor": 2}}),
    "pipeline, tied": (2, {"parallel": {"pipeline": 2}, "model": {"tied": True}}),
    "interleaved": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "model": {"layers": 4}}),
    "full recomputation": (1, {"train": {"recompute": "full"}, "model": {"layers": 4}}),
    "selective, grouped": (2, {"train": {"recompute": "selective"}, "parallel": SPLIT, "model": {"kv_heads": 2}}),
    "fp32, not sharded": (2, {"train": {"precision": "fp32"}, "parallel": {"distributed_optimizer": False}}),
    "large micro-batch": (
        2,
        {
            "train": {"micro_batch_size": 8, "ema_decay": 0.999},
            "model": {"tied": True, "kv_heads": 2},
            "parallel": {"overlap_grad_reduce": False, "overlap_param_gather": False},
        },
    ),
    "norms, biases, learned": (1, {"model": {"qk_norm": True, "position": "learned", "qkv_bias": True}}),
    "all rates, small chunks": (1, {"objective": {"mask_schedule": "uniform:0,1", "head_chunk": 256}}),
    "adapters": (2, {"lora": {"rank": 32}, "parallel": SPLIT}),
    "8b": (8, EIGHT_B),
}  # fmt: skip


def config_of(sections: dict[str, Any]) -> ResolvedConfig:
    base: dict[str, Any] = {
        "model": {"layers": 2, "hidden": 512, "heads": 8, "ffn": 1376, "tied": False, "vocab": 16384},
        "parallel": {},
        "data": {"seq_length": 1024},
        "objective": {"mask_schedule": "uniform:0.45,0.55"},
        "train": {"precision": "bf16", "global_batch_size": 16, "micro_batch_size": 2},
    }
    if "preset" in sections.get("model", {}):
        base["model"] = {}
    content = {name: {**section, **sections.get(name, {})} for name, section in base.items()}
    if "lora" in sections:
        content |= {"lora": sections["lora"], "checkpoint": {"load": "runs/base", "load_only": "model"}}
    return resolve(config_from_mapping({**content, "train": {**content["train"], "device": "cuda"}}))


OTHER_FLOPS = {"full recomputation", "selective", "adapters"}


@dataclass(frozen=True)
class Run:
    config: ResolvedConfig
    layout: Layout
    stages: list[Stage]


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    if compiler() is None:
        pytest.skip("torch needs a device guard for fake CUDA tensors, and there is no C++ compiler to make it")
    configs = {name: config_of(sections) for name, (_, sections) in LAYOUTS.items()}
    checked = [(config, check_config(config, LAYOUTS[name][0], corpora=False)) for name, config in configs.items()]
    found = simulate(checked)
    return {name: Run(*run, stages) for name, run, stages in zip(LAYOUTS, checked, found, strict=True)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_dry_run_estimates_the_peak_of_the_real_step_within_3_percent(name: str, runs: dict[str, Run]) -> None:
    run = runs[name]
    peak = max(stage.peak for stage in run.stages)
    assert memory_per_rank(run.config, run.layout).total == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_the_peak_holds_adds_up_to_it(name: str, runs: dict[str, Run]) -> None:
    for stage in runs[name].stages:
        assert sum(stage.memory.values()) == stage.peak
        assert stage.built == pytest.approx(
            sum(stage.memory[key] for key in ("weights", "gradients", "optimizer")), rel=1e-3
        )


def test_static_memory_is_that_of_the_parameters(runs: dict[str, Run]) -> None:
    expected = {"one rank": 18, "tensor and data": 12, "fp32, not sharded": 16, "8b": 12}
    expected["large micro-batch"] = 14  # an average of the weights
    for name, per_parameter in expected.items():
        (stage,) = runs[name].stages
        assert stage.built == pytest.approx(per_parameter * stage.parameters, rel=1e-3)


def test_the_8b_layout_is_that_of_the_audit(runs: dict[str, Run]) -> None:
    (stage,) = runs["8b"].stages
    assert stage.parameters == 2_004_094_976
    assert stage.built / 2**30 == pytest.approx(22.40, abs=0.005)
    assert stage.flops() == pytest.approx(1.043e14, rel=1e-3)


def forward_flops(run: Run) -> tuple[float, float, float]:
    """FLOPs of the forward passes of a step, of the whole model: (matrices of the layers, attention, head)."""
    model, data, train = run.config.model, run.config.data, run.config.train
    tokens = train.global_batch_size * data.seq_length
    layers = 2.0 * tokens * model.layers * layer_matrices(model)
    attention = 4.0 * tokens * data.seq_length * model.layers * model.hidden
    return layers, attention, 2.0 * 0.5 * tokens * model.hidden * model.vocab


@pytest.mark.parametrize("name", [name for name in LAYOUTS if not OTHER_FLOPS & {*name.split(", ")}])
def test_flops_of_all_ranks_are_those_of_the_model(name: str, runs: dict[str, Run]) -> None:
    run = runs[name]
    copies = run.layout.world // len(run.stages)
    found = {kind: copies * sum(stage.flops(kind) for stage in run.stages) for kind in KINDS}
    layers, attention, head = forward_flops(run)
    assert found["layers"] == pytest.approx(3 * layers)
    # The flash kernel computes the scores anew in its backward pass: five products after two.
    assert found["attention"] == pytest.approx(3.5 * attention)
    assert found["head"] == pytest.approx(3 * head)
    assert found["recomputed"] == 0
    tokens = run.config.train.global_batch_size * run.config.data.seq_length
    model_flops = training_flops_per_token(run.config, run.config.model.vocab) * tokens
    assert sum(found.values()) - 0.5 * attention == pytest.approx(model_flops)


def test_frozen_weights_cost_no_gradients_of_their_own(runs: dict[str, Run]) -> None:
    run = runs["adapters"]
    (stage,) = run.stages
    layers, _, head = forward_flops(run)
    model, tokens = run.config.model, run.config.train.global_batch_size * run.config.data.seq_length
    # Nothing before the first adapters needs a gradient.
    first = 2.0 * tokens * 3 * model.hidden**2
    adapters = 2.0 * tokens * (3 * model.layers * 32 * (9 * model.hidden + 3 * model.ffn + 2 * model.hidden))
    assert run.layout.world * stage.flops("head") == pytest.approx(2 * head)
    assert run.layout.world * stage.flops("layers") == pytest.approx(2 * layers - first + adapters, rel=0.01)
    assert stage.memory["gradients"] == pytest.approx(stage.memory["optimizer"] / 3, rel=1e-2)
    assert stage.memory["gradients"] < 0.1 * stage.memory["weights"]


def test_recomputation_is_a_forward_pass_of_what_is_recomputed(runs: dict[str, Run]) -> None:
    layers, attention, _ = forward_flops(runs["full recomputation"])
    (stage,) = runs["full recomputation"].stages
    assert stage.flops("recomputed") == pytest.approx(layers + attention)
    _, attention, _ = forward_flops(runs["selective, grouped"])
    (stage,) = runs["selective, grouped"].stages
    assert stage.flops("recomputed") == pytest.approx(attention / 2)


def traffic(stage: Stage, group: str) -> dict[str, tuple[int, int]]:
    """(calls, bytes) by operation."""
    return {name: (count, size) for name, found, _, count, size in stage.per_group() if found == group}


def test_sequence_parallel_layers_gather_and_scatter_their_rows(runs: dict[str, Run]) -> None:
    run = runs["tensor and data"]
    (stage,) = run.stages
    rows = run.config.train.micro_batch_size * run.config.data.seq_length * run.config.model.hidden * 2
    layers, batches = run.config.model.layers, run.layout.micro_batches
    found = traffic(stage, "tensor")
    # Forward 2 of each and backward 4 and 2 in every layer; one of each for embedding and head, there and back.
    assert found["_allgather_base"] == ((6 * layers + 2) * batches, (6 * layers + 2) * batches * rows)
    assert found["_reduce_scatter_base"] == ((4 * layers + 2) * batches, (4 * layers + 2) * batches * rows)


def test_gradients_are_reduced_and_weights_gathered_once_a_step(runs: dict[str, Run]) -> None:
    (stage,) = runs["tensor and data"].stages
    found = traffic(stage, "data")
    (reduced,) = (size for name, (_, size) in found.items() if name.startswith("reduce_scatter"))
    (gathered,) = (size for name, (_, size) in found.items() if name.startswith("allgather"))
    assert reduced == pytest.approx(4 * stage.parameters, rel=1e-3)
    assert gathered == pytest.approx(2 * stage.parameters, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "adapters"])
def test_every_step_ends_with_an_update(name: str, runs: dict[str, Run]) -> None:
    run = runs[name]
    data = run.layout.data if run.config.parallel.distributed_optimizer else 1
    for stage in run.stages:
        moved = sum(kernel.bytes * kernel.count for kernel in stage.kernels if kernel.name == "aten::_fused_adamw_")
        # Weight, gradient and two averages are read in fp32, and all but the gradient written.
        assert moved == pytest.approx(28 * stage.parameters / data, rel=1e-2)


def test_without_overlap_weights_are_gathered_by_the_update(runs: dict[str, Run]) -> None:
    (stage,) = runs["large micro-batch"].stages
    (gathered,) = (one for one in stage.collectives if one.name.startswith("allgather"))
    assert (gathered.part, gathered.group) == (UPDATE, "data")
    assert gathered.bytes == pytest.approx(2 * stage.parameters, rel=1e-2)


def test_pipeline_stages_send_each_micro_batch_once_each_way(runs: dict[str, Run]) -> None:
    run = runs["pipeline, tied"]
    rows = run.config.train.micro_batch_size * run.config.data.seq_length * run.config.model.hidden * 2
    for stage in run.stages:
        found = traffic(stage, "pipeline")
        assert found["send"] == found["recv"] == (run.layout.micro_batches, run.layout.micro_batches * rows)

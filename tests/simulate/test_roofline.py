"""The roofline against times worked out by hand on a device with round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_md.run.estimate import training_flops_per_token
from megatron_md.simulate.roofline import Assumptions, Roofline, forecast, step_time
from megatron_md.simulate.stage import BACKWARD, FORWARD, UPDATE
from tests.simulate.made_up import DEVICE, IDEAL, collective, kernel, run, stage

ROOFLINE = Roofline(DEVICE, "bf16", IDEAL)


def test_a_kernel_takes_the_longest_of_arithmetic_memory_and_launch() -> None:
    assert ROOFLINE.kernels([kernel(FORWARD, 2e12, 1e9, count=3)]) == pytest.approx(6.0)
    assert ROOFLINE.kernels([kernel(FORWARD, 1e11, 5e9)]) == pytest.approx(0.5)
    assert Roofline(DEVICE, "fp32", IDEAL).kernels([kernel(FORWARD, 2e12, 1e9)]) == pytest.approx(20.0)
    slow = Roofline(DEVICE, "bf16", replace(IDEAL, matmul=0.5, attention=0.25, memory=0.1, kernel_seconds=0.01))
    assert slow.kernels([kernel(FORWARD, 1e12)]) == pytest.approx(2.0)
    assert slow.kernels([kernel(FORWARD, 1e12, name="aten::flash_attention")]) == pytest.approx(4.0)
    assert slow.kernels([kernel(FORWARD, 0, 1e9)]) == pytest.approx(1.0)
    assert slow.kernels([kernel(FORWARD, count=7)]) == pytest.approx(0.07)


@pytest.mark.parametrize(
    ("name", "ranks", "apart", "seconds"),
    [
        ("_allgather_base", 1, 1, 0.0),
        ("_allgather_base", 4, 1, 0.75),  # of a ring within a node
        ("reduce_scatter_tensor_coalesced", 4, 1, 0.75),
        ("allreduce", 4, 1, 1.5),
        ("allreduce", 2, 4, 10.0),  # one rank a node: half of it twice over the network
        ("_allgather_base", 8, 1, 1.25),  # half of it through the four ports of a node
        ("send", 2, 1, 1.0),
        ("send", 2, 4, 10.0),
    ],
)
def test_a_collective_is_a_ring_over_the_slower_of_links_and_network(
    name: str, ranks: int, apart: int, seconds: float
) -> None:
    one = collective(FORWARD, name, "data", ranks, 1e9, apart=apart)
    assert ROOFLINE.collective(one) == pytest.approx(seconds)


def test_every_call_has_a_latency() -> None:
    late = Roofline(DEVICE, "bf16", replace(IDEAL, collective_seconds=0.1))
    assert late.collective(collective(FORWARD, "allreduce", "data", 2, 0, count=3)) == pytest.approx(0.3)
    assert late.collective(collective(FORWARD, "allreduce", "data", 1, 0, count=3)) == 0.0


def test_a_pipeline_takes_its_slowest_stage_and_a_bubble() -> None:
    config, layout = run(4, parallel={"pipeline": 4}, train={"micro_batch_size": 1})
    assert layout.micro_batches == 8
    fast, slow = (stage([kernel(FORWARD, flops)], number=number) for number, flops in enumerate((1e12, 2e12)))
    time = step_time([fast, slow], config, layout, ROOFLINE)
    assert time.compute == pytest.approx(2.0)
    assert time.bubble == pytest.approx(2.0 * 3 / 8)
    twice = replace(config, parallel=replace(config.parallel, virtual_pipeline=2))
    assert step_time([fast, slow], twice, layout, ROOFLINE).bubble == pytest.approx(2.0 * 3 / 8 / 2)


def test_data_parallelism_is_hidden_by_one_micro_batch_where_the_config_says_so() -> None:
    reduce = collective(BACKWARD, "reduce_scatter_tensor_coalesced", "data", 2, 4e9, count=8)  # 2 s in 8 buckets
    gather = collective(FORWARD, "allgather_into_tensor_coalesced", "data", 2, 2e9, count=2)  # 1 s in 2
    kernels = [kernel(FORWARD, 4e12), kernel(BACKWARD, 6e12)]
    found = stage(kernels, [reduce, gather], micro_batches=4)

    def exposed(**overlap: bool) -> float:
        config, layout = run(2, parallel=overlap, train={"micro_batch_size": 1})
        return step_time([found], config, layout, ROOFLINE).data

    assert exposed(overlap_grad_reduce=False) == pytest.approx(3.0)
    # 2 s against the 1.5 s of a backward pass; the gather hides but for one of its buckets.
    assert exposed(overlap_param_gather=False) == pytest.approx(0.5 + 1.0)
    assert exposed() == pytest.approx(0.5 + 0.5)  # on CUDA both overlap unless told otherwise


def test_each_second_of_a_step_is_counted_once() -> None:
    config, layout = run(1)
    collectives = [
        collective(FORWARD, "allreduce", "tensor", 2, 1e9),
        collective(BACKWARD, "recv", "pipeline", 2, 3e9),
        collective(BACKWARD, "send", "pipeline", 2, 2e9),
        collective(UPDATE, "allreduce", "world", 2, 5e9),
    ]
    time = step_time([stage([kernel(UPDATE, 7e12)], collectives)], config, layout, ROOFLINE)
    assert (time.tensor, time.pipeline, time.update) == pytest.approx((1.0, 3.0, 12.0))
    assert time.total == pytest.approx(16.0)


def test_a_forecast_of_a_run() -> None:
    config, layout = run(1)
    found = forecast([stage([kernel(FORWARD, 3e12)])], config, layout, DEVICE, IDEAL)
    tokens = 8 * config.data.seq_length
    assert found.tokens_per_second == pytest.approx(tokens / 3.0)
    assert found.executed == pytest.approx(1.0)
    assert found.mfu == pytest.approx(training_flops_per_token(config, 512) * tokens / 3e12)
    assert found.days == pytest.approx(10 * 3.0 / 86400)
    assert found.gpu_hours == pytest.approx(10 * 3.0 / 3600)
    assert (
        found.fits
        and not forecast([stage([kernel(FORWARD, 1)])], config, layout, replace(DEVICE, memory_bytes=644), IDEAL).fits
    )


def test_middle_stages_count_as_often_as_there_are() -> None:
    config, layout = run(
        8, parallel={"pipeline": 4}, model={"preset": "tiny", "vocab": 512}, train={"micro_batch_size": 4}
    )
    stages = [stage([kernel(FORWARD, flops)], number=number) for number, flops in ((0, 1e12), (1, 10e12), (3, 100e12))]
    # Two data-parallel replicas of 1 + 10 + 10 + 100.
    assert forecast(stages, config, layout, DEVICE, Assumptions()).flops == pytest.approx(2 * 121e12)

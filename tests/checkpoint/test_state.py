"""The state of model and optimizer: exact on the same layout, equal within rounding on every other."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.checkpoint.directory import latest_checkpoint
from megatron_md.checkpoint.state import rectangles
from megatron_md.config import Config, MegatronConfig
from tests.checkpoint.legs import (
    CONTEXT2,
    ONE,
    OVERLAP,
    PIPELINE2,
    SHARDED,
    TENSOR2,
    build_manager,
    cold_start,
    leg,
    legs_config,
    uninterrupted,
)
from tests.ranks import run_ranks
from tests.small_run import small_run

SMALL_BUCKETS = MegatronConfig(ddp={"bucket_size": 20_000})


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (3, 4, 5), (5, 1), (1, 6)])
def test_rectangles_cover_every_range_once_and_in_order(shape: tuple[int, ...]) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for start in range(numbers.size):
        for stop in range(start, numbers.size + 1):
            cut = list(rectangles(shape, start, stop))
            parts = [numbers[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))] for offset, size in cut]
            assert [part.shape for part in parts] == [size for _, size in cut]
            covered = np.concatenate([part.ravel() for part in parts]) if parts else np.array([])
            np.testing.assert_array_equal(covered, np.arange(start, stop))
            assert len(cut) <= max(1, 2 * len(shape) - 1)


def two_legs(first: tuple[int, Config], then: tuple[int, Config], run_dir: Path) -> list[Any]:
    start = run_ranks(leg, first[0], first[1], run_dir, 0, 3, True)[0]
    return [*start, *run_ranks(leg, then[0], then[1], run_dir, 3, 6, False)[0]]


SAME = [
    (1, ONE, True),
    (3, SHARDED, True),
    pytest.param(2, {**PIPELINE2, "virtual_pipeline": 2}, False, marks=pytest.mark.slow),
    pytest.param(1, SHARDED, True, marks=pytest.mark.slow),
    pytest.param(2, TENSOR2, True, marks=pytest.mark.slow),
    pytest.param(2, OVERLAP, True, marks=pytest.mark.slow),
    pytest.param(4, {"tensor": 2, "pipeline": 2}, False, marks=pytest.mark.slow),
    pytest.param(4, {**PIPELINE2, **SHARDED}, True, marks=pytest.mark.slow),
    pytest.param(4, {**CONTEXT2, **PIPELINE2, **SHARDED}, True, marks=pytest.mark.slow),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "layout", "tied"), SAME)
def test_resume_on_the_same_layout_is_exact(size: int, layout: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    config = legs_config(layout, tied=tied)
    assert two_legs((size, config), (size, config), tmp_path) == uninterrupted(size, json.dumps(layout), tied)


ACROSS = [
    # Several padded buckets, tied embeddings on two pipeline stages: where megatron-core's own format goes wrong.
    (4, {**PIPELINE2, **OVERLAP}, 3, OVERLAP),
    pytest.param(3, OVERLAP, 4, {**PIPELINE2, **OVERLAP}, marks=pytest.mark.slow),
    pytest.param(3, OVERLAP, 4, {**CONTEXT2, **OVERLAP}, marks=pytest.mark.slow),
    pytest.param(4, {**CONTEXT2, **OVERLAP}, 1, ONE, marks=pytest.mark.slow),
    pytest.param(3, OVERLAP, 3, OVERLAP, marks=pytest.mark.slow),
    pytest.param(3, OVERLAP, 2, SHARDED, marks=pytest.mark.slow),
    pytest.param(2, TENSOR2 | SHARDED, 3, OVERLAP, marks=pytest.mark.slow),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "layout", "then", "layout_then"), ACROSS)
def test_another_layout_goes_on_as_if_it_had_been_there_from_the_start(
    size: int, layout: dict[str, Any], then: int, layout_then: dict[str, Any], tmp_path: Path
) -> None:
    configs = [replace(legs_config(keys, tied=True), megatron=SMALL_BUCKETS) for keys in (layout, layout_then)]
    if "overlap_grad_reduce" in layout:
        assert run_ranks(padded_buckets, size, configs[0])[0] >= 2
    curve = two_legs((size, configs[0]), (then, configs[1]), tmp_path)
    whole = run_ranks(leg, then, configs[1], Path("/nonexistent"), 0, 6, False)[0]
    np.testing.assert_allclose(curve, whole, rtol=1e-6)


def written_anew(config: Config, source: Path, target: Path) -> None:
    """Read the newest checkpoint of one run and save what was read as another one's."""
    with small_run(config) as run:
        loaded = build_manager(source).load_newest(run.chunks, run.optimizer)
        assert loaded is not None
        manager = build_manager(target)
        manager.begin(run.chunks, run.optimizer, loaded[1], in_background=False)
        manager.finish()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("size", "layout", "then", "layout_then"), [(2, ONE, 3, OVERLAP), (3, OVERLAP, 1, ONE)])
def test_bf16_goes_through_another_layout_to_the_bit(
    size: int, layout: dict[str, Any], then: int, layout_then: dict[str, Any], tmp_path: Path
) -> None:
    # A curve on the other layout would say less: gradients summed in another order round some bf16 weights otherwise.
    config, other = (
        replace(legs_config(keys, tied=True, precision="bf16"), megatron=SMALL_BUCKETS)
        for keys in (layout, layout_then)
    )
    start = run_ranks(leg, size, config, tmp_path / "first", 0, 3, True)[0]
    run_ranks(written_anew, then, other, tmp_path / "first", tmp_path / "second")
    rest = run_ranks(leg, size, config, tmp_path / "second", 3, 6, False)[0]
    assert [*start, *rest] == run_ranks(leg, size, config, Path("/nonexistent"), 0, 6, False)[0]


def padded_buckets(config: Config) -> int:
    """How many of this rank's gradient buckets end in padding."""
    with small_run(config) as run:
        buckets = [bucket for chunk in run.chunks for buffer in chunk.buffers for bucket in buffer.buckets]
        return sum(bucket.grad_data.numel() != bucket.numel_unpadded for bucket in buckets)


FOUR_LEGS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "tensor, pipeline, data": [(2, {**TENSOR2, **ONE}), (2, {**PIPELINE2, **SHARDED}), (2, SHARDED), (1, ONE)],
    "context": [(1, ONE), (2, {**CONTEXT2, **SHARDED}), (1, ONE), (2, {**CONTEXT2, **ONE})],
}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_LEGS)
def test_four_legs_on_four_layouts_follow_the_single_run(name: str, tmp_path: Path) -> None:
    curve = []
    for number, (size, layout) in enumerate(FOUR_LEGS[name]):
        config = legs_config(layout, tied=True)
        curve += run_ranks(leg, size, config, tmp_path, 5 * number, 5 * number + 5, True)[0]
    np.testing.assert_allclose(curve, uninterrupted(1, json.dumps(ONE), True, 20), rtol=1e-5)


@pytest.mark.distributed
def test_the_optimizer_state_is_carried_over_not_just_weights(tmp_path: Path) -> None:
    """Weights only (`checkpoint.load_only`) start at the same loss, and then go another way."""
    config = legs_config(SHARDED, tied=True)
    run_ranks(leg, 2, config, tmp_path, 0, 3, True)
    cold = run_ranks(cold_start, 2, config, latest_checkpoint(tmp_path), 3, 6)[0]
    warm = uninterrupted(2, json.dumps(SHARDED), True)[3:]
    assert cold[0] == warm[0]
    assert abs(cold[2][0] / warm[2][0] - 1) > 1e-4


@pytest.mark.distributed
@pytest.mark.slow
def test_weights_alone_reach_the_optimizers_own_copy_in_bf16(tmp_path: Path) -> None:
    """Without the reload, the first update would bring back the fresh model's fp32 parameters."""
    config = legs_config(SHARDED, tied=True, precision="bf16")
    run_ranks(leg, 2, config, tmp_path, 0, 6, True)
    fresh = run_ranks(leg, 2, config, Path("/nonexistent"), 0, 3, False)[0]
    cold = run_ranks(cold_start, 2, config, latest_checkpoint(tmp_path), 6, 9)[0]
    assert cold[2][0] < fresh[0][0] - 0.05

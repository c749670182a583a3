"""Initial weights: standard normal numbers that depend on (seed, name, element) and on nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from megatron_md.model.initialize import normal_rows
from tests.ranks import run_ranks
from tests.small_run import small_run, variant


def test_any_slice_of_rows_is_a_slice_of_the_whole() -> None:
    whole = normal_rows(1, "a.weight", 0, 50, 7)
    np.testing.assert_array_equal(normal_rows(1, "a.weight", 13, 9, 7), whole[13:22])


def test_seed_and_name_matter() -> None:
    first = normal_rows(1, "a.weight", 0, 4, 8)
    assert not np.any(first == normal_rows(2, "a.weight", 0, 4, 8))
    assert not np.any(first == normal_rows(1, "b.weight", 0, 4, 8))


def test_numbers_are_standard_normal() -> None:
    values = np.sort(normal_rows(3, "c.weight", 0, 1000, 100).ravel())
    # Kolmogorov-Smirnov: sup|F_n - F| exceeds 2.2/sqrt(n) with probability 1e-4 for a right sampler.
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in values[::10]])
    empirical = (np.arange(len(values)) + 0.5)[::10] / len(values)
    assert np.max(np.abs(cdf - empirical)) < 2.2 / math.sqrt(len(values))
    assert abs(np.corrcoef(values.reshape(-1)[::2], values[::2])[0, 1] - 1.0) < 1e-12


def test_neighbours_are_uncorrelated() -> None:
    table = normal_rows(4, "d.weight", 0, 2000, 64)
    for left, right in ((table[:, :-1], table[:, 1:]), (table[:-1], table[1:])):
        correlation = float(np.mean(left * right))
        assert abs(correlation) < 5.0 / math.sqrt(left.size)


def curve(config: Any, is_late: bool) -> Any:
    """On a rank: two steps, with weights that are drawn first, or last of all."""
    import torch

    from megatron_md.model.build import draw_weights, settled_parameters

    with small_run(config) as run:
        if is_late:
            with torch.no_grad(), settled_parameters(run.chunks):
                for chunk in run.chunks:
                    for parameter in chunk.parameters():
                        parameter.fill_(float("nan"))
            run.optimizer.reload_model_params()
            draw_weights(config, run.chunks)
            run.optimizer.reload_model_params()
        return run.train(0, 2)


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, {}),
        (2, {"distributed_optimizer": True, "overlap_param_gather": True, "overlap_grad_reduce": True}),
        (2, {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True}),
    ],
)
def test_weights_may_be_drawn_when_all_is_built(size: int, layout: dict[str, Any], precision: str) -> None:
    config = variant(parallel=layout, train={"precision": precision})
    assert run_ranks(curve, size, config, True, timeout=60) == run_ranks(curve, size, config, False, timeout=60)


def drawn_numbers(config: Any) -> tuple[int, float]:
    """On a rank: how many numbers it drew itself, and the sum of its weights' squares."""
    from unittest import mock

    from megatron_md.model import initialize

    counted = mock.Mock(side_effect=normal_rows)
    with mock.patch.object(initialize, "normal_rows", counted), small_run(config) as run:
        squares = sum(float(p.double().square().sum()) for chunk in run.chunks for p in chunk.parameters())
    return sum(call.args[3] * call.args[4] for call in counted.call_args_list), squares


@pytest.mark.distributed
def test_ranks_that_hold_the_same_weights_share_their_drawing() -> None:
    ((whole, squares),) = run_ranks(drawn_numbers, 1, variant())
    found = run_ranks(drawn_numbers, 2, variant())
    assert sum(count for count, _ in found) == whole
    assert max(count for count, _ in found) < 0.7 * whole
    assert [total for _, total in found] == [squares] * 2

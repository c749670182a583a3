"""Our parts in a loop that is not ours: the one of megatron-core's own example, with megatron-core's optimizer."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.config import Config
from megatron_md.config.training import BatchRampConfig
from megatron_md.errors import UserError
from tests.integrations.foreign_loop import LAYOUTS, STEPS, assert_same, foreign_loop, small, start
from tests.ranks import run_ranks
from tests.small_run import ROWS


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("one", "pipeline2-interleaved") else pytest.mark.slow)
        for name in LAYOUTS
    ],
)
def test_a_foreign_loop_computes_what_our_trainer_does(
    name: str, bigrams: dict[str, str], ours: list[dict[str, Any]], tmp_path: Path
) -> None:
    size, layout = LAYOUTS[name]
    config = small(tmp_path, bigrams, parallel={"distributed_optimizer": False, **layout})
    assert_same(run_ranks(foreign_loop, size, config, STEPS), ours)


@pytest.mark.distributed
def test_the_form_with_a_state_needs_no_data_iterator(
    bigrams: dict[str, str], ours: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert_same(run_ranks(foreign_loop, 1, small(tmp_path, bigrams), STEPS, True), ours)


def test_signatures_are_those_that_the_trainers_look_at() -> None:
    """Megatron-Bridge injects its state by the first parameter's name; Megatron-LM names the provider's arguments."""
    from megatron_md.integrations.bridge import DiffusionTask

    words = {
        name: list(inspect.signature(getattr(DiffusionTask, name)).parameters)[1:]
        for name in ("forward_step", "bridge_forward_step", "model_provider")
    }
    assert words["forward_step"] == ["data_iterator", "model", "return_schedule_plan"]
    assert words["bridge_forward_step"] == ["state", "data_iterator", "model", "return_schedule_plan"]
    assert words["model_provider"][:5] == ["pre_process", "post_process", "vp_stage", "config", "pg_collection"]


def batches(config: Config, consumed: int, count: int) -> list[Any]:
    from megatron_md.integrations.bridge import DiffusionTask
    from megatron_md.parallel import shutdown

    start(config)
    task = DiffusionTask(config)
    provide = task.datasets_provider(lambda: consumed)
    assert provide.is_distributed  # type: ignore[attr-defined]
    iterator, valid, test = provide([0, 0, 0])
    assert valid is test is None
    found = [(batch.tokens_BL, batch.positions_M) for batch in itertools.islice(iterator, count)]
    shutdown()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    "keys", [{}, {"train": {"steps": 9, "batch_ramp": BatchRampConfig(start=4, increment=4, steps=3)}}]
)
def test_a_resumed_iterator_goes_on_with_the_same_rows_and_masks(
    keys: dict[str, Any], bigrams: dict[str, str], tmp_path: Path
) -> None:
    config = small(tmp_path, bigrams, **keys)
    ramped = 2 if keys else 0  # two steps of 4 rows come first
    consumed = (4 if ramped else ROWS) * 2
    whole = run_ranks(batches, 1, config, 0, 12)[0]
    rest = run_ranks(batches, 1, config, consumed, 4)[0]
    first = consumed // config.train.micro_batch_size
    for (tokens, positions), (expected_tokens, expected_positions) in zip(rest, whole[first:], strict=False):
        np.testing.assert_array_equal(tokens, expected_tokens)
        np.testing.assert_array_equal(positions, expected_positions)


def refusals(config: Config) -> list[str]:
    """What is said about trainers that contradict the config."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    from megatron_md.integrations.bridge import DiffusionTask
    from megatron_md.parallel import shutdown

    start(config)
    task = DiffusionTask(config)
    theirs = SimpleNamespace(**{**vars(task.transformer), "num_layers": 24})
    said = []
    calls = [
        lambda: task.model_provider(config=theirs),
        lambda: next(task.data_iterator(consumed_samples=3)),
        lambda: task.forward_step(iter(()), None, return_schedule_plan=True),
        lambda: task.bridge_forward_step(None, None, torch.nn.Linear(1, 1).eval()),
        lambda: next(task.data_iterator()),
    ]
    for number, call in enumerate(calls):
        if number == len(calls) - 1:
            init_num_microbatches_calculator(0, None, 2 * ROWS, config.train.micro_batch_size, 1)
        with pytest.raises(UserError) as error:
            call()
        said.append(str(error.value))
    shutdown()
    return said


@pytest.mark.distributed
def test_a_trainer_that_contradicts_the_config_is_refused(bigrams: dict[str, str], tmp_path: Path) -> None:
    layers, consumed, plan, evaluation, count = run_ranks(refusals, 1, small(tmp_path, bigrams))[0]
    assert "num_layers (from our config) is 4, the trainer's is 24" in layers
    assert "consumed 3 samples" in consumed
    assert "schedule plan" in plan
    assert "eval_iters to 0" in evaluation
    assert "the trainer takes 8 micro-batches" in count


def test_a_config_without_a_corpus_is_refused(tmp_path: Path) -> None:
    from megatron_md.integrations.bridge import DiffusionTask

    with pytest.raises(UserError, match=r"data\.train"):
        DiffusionTask(small(tmp_path, {}))

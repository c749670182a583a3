"""Checkpoints: exact on the same layout, equal within rounding on another, complete or absent on the disk."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.checkpoint.manager import CheckpointManager, checkpoint_name, latest_checkpoint, read_progress
from megatron_md.config import Config
from megatron_md.train.progress import Progress
from tests.ranks import RankError, run_ranks
from tests.small_run import Curve, small_run, variant

ONE: dict[str, Any] = {"distributed_optimizer": False}
TENSOR2, PIPELINE2, DATA2 = {"tensor": 2}, {"pipeline": 2}, {"distributed_optimizer": True}
SHARDED = {"distributed_optimizer": True}


def leg(config: Config, run_dir: Path, first: int, stop: int, save: bool) -> Curve:
    """Train from the newest checkpoint (or from the start) and save."""
    with small_run(config) as run:
        manager = CheckpointManager(run_dir, keep_last=2, resolved_config="")
        newest = latest_checkpoint(run_dir)
        if newest is not None:
            assert manager.load(run.chunks, run.optimizer, newest).step == first
        curve = run.train(first, stop)
        if save:
            manager.save(run.chunks, run.optimizer, Progress(stop, stop * 8, stop * 256, 10_000))
        return curve


@cache
def uninterrupted(size: int, layout: str, tied: bool) -> Curve:
    config = variant(model={"tied": tied}, parallel=json.loads(layout))
    return run_ranks(leg, size, config, Path("/nonexistent"), 0, 8, False)[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "layout", "tied"),
    [
        (1, ONE, True),
        (1, SHARDED, True),
        (2, TENSOR2, True),
        (2, PIPELINE2, True),
        (2, DATA2, True),
        (2, {**DATA2, "overlap_grad_reduce": True, "overlap_param_gather": True}, True),
        (2, {**PIPELINE2, "virtual_pipeline": 2}, False),
        (4, {"tensor": 2, "pipeline": 2}, False),
    ],
)
def test_resume_on_the_same_layout_is_exact(size: int, layout: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    config = variant(model={"tied": tied}, parallel=layout)
    start = run_ranks(leg, size, config, tmp_path, 0, 4, True)[0]
    end = run_ranks(leg, size, config, tmp_path, 4, 8, False)[0]
    assert start + end == uninterrupted(size, json.dumps(layout), tied)


@pytest.mark.distributed
def test_four_legs_on_four_layouts_follow_the_single_run(tmp_path: Path) -> None:
    legs = [(2, {**TENSOR2, **SHARDED}), (2, {**PIPELINE2, **SHARDED}), (2, DATA2), (1, SHARDED)]
    curve: Curve = []
    for number, (size, layout) in enumerate(legs):
        config = variant(model={"tied": False}, parallel=layout)
        curve += run_ranks(leg, size, config, tmp_path, 2 * number, 2 * number + 2, True)[0]
    np.testing.assert_allclose(curve, uninterrupted(1, json.dumps(SHARDED), False), rtol=1e-5)


@pytest.mark.distributed
def test_optimizer_state_is_carried_over_not_just_weights(tmp_path: Path) -> None:
    config = variant(parallel=SHARDED)
    run_ranks(leg, 1, config, tmp_path, 0, 4, True)
    (cold,) = run_ranks(cold_start, 1, config, latest_checkpoint(tmp_path))
    assert cold[0] == uninterrupted(1, json.dumps(SHARDED), True)[4]
    assert abs(cold[3][0] / uninterrupted(1, json.dumps(SHARDED), True)[7][0] - 1) > 1e-4


def cold_start(config: Config, checkpoint: Path) -> Curve:
    """Continue with the checkpoint's weights and a fresh optimizer."""
    from megatron_md.checkpoint.manager import load_model

    with small_run(config) as run:
        load_model(run.chunks, checkpoint)
        run.optimizer.reload_model_params()
        return run.train(4, 8)


@pytest.mark.distributed
@pytest.mark.parametrize(("first", "then"), [(PIPELINE2, TENSOR2), (TENSOR2, PIPELINE2)])
def test_what_core_cannot_move_is_refused_by_name(first: dict[str, Any], then: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(leg, 2, variant(parallel={**first, **SHARDED}), tmp_path, 0, 1, True)
    with pytest.raises(RankError, match="resume with the layout that wrote it"):
        run_ranks(leg, 2, variant(parallel={**then, **SHARDED}), tmp_path, 1, 2, False)


def save_many(config: Config, run_dir: Path) -> None:
    """Save after each of four steps."""
    with small_run(config) as run:
        manager = CheckpointManager(run_dir, keep_last=2, resolved_config="seed: 1\n")
        for step in range(1, 5):
            manager.save(run.chunks, run.optimizer, Progress(step, step, step, 10))


@pytest.mark.distributed
def test_the_last_ones_are_kept_and_latest_names_the_newest(tmp_path: Path) -> None:
    run_ranks(save_many, 1, variant(parallel=SHARDED), tmp_path)
    directory = tmp_path / "checkpoints"
    assert sorted(path.name for path in directory.glob("*")) == ["latest", checkpoint_name(3), checkpoint_name(4)]
    newest = latest_checkpoint(tmp_path)
    assert newest == directory / checkpoint_name(4) and read_progress(newest) == Progress(4, 4, 4, 10)
    assert (newest / "config.yaml").read_text() == "seed: 1\n"


@pytest.mark.distributed
def test_state_of_another_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    run_ranks(leg, 1, variant(parallel=SHARDED), tmp_path, 0, 1, True)
    with pytest.raises(RankError, match="DistributedOptimizer, this run has FP32Optimizer"):
        run_ranks(leg, 1, variant(parallel=ONE), tmp_path, 1, 2, False)


@pytest.mark.distributed
def test_the_one_before_is_taken_where_the_newest_is_gone(tmp_path: Path) -> None:
    run_ranks(save_many, 1, variant(parallel=SHARDED), tmp_path)
    directory = tmp_path / "checkpoints"
    shutil.rmtree(directory / checkpoint_name(4))
    assert latest_checkpoint(tmp_path) == directory / checkpoint_name(3)
    (directory / checkpoint_name(3) / "progress.json").unlink()
    with pytest.raises(ValueError, match="none of its 1 checkpoints is complete"):
        latest_checkpoint(tmp_path)


def test_an_incomplete_directory_is_never_taken(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    broken = tmp_path / "checkpoints" / checkpoint_name(5)
    broken.mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text(broken.name)
    with pytest.raises(ValueError, match="none of its 1 checkpoints is complete"):
        latest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        read_progress(broken)

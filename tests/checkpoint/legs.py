"""Trainings in legs: each starts from the newest checkpoint of the one before, on a layout of its own."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from megatron_md.config import Config
from tests.ranks import run_ranks
from tests.small_run import CONFIG, Curve, small_run, variant

ONE: dict[str, Any] = {"distributed_optimizer": False}
SHARDED: dict[str, Any] = {"distributed_optimizer": True}
TENSOR2, PIPELINE2, CONTEXT2 = {"tensor": 2}, {"pipeline": 2}, {"context": 2}
OVERLAP = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}


def progress_at(step: int) -> Any:
    """A progress at some step; the rest of it is of no interest."""
    from megatron_md.train.progress import Progress

    return Progress(step, step * 12, step * 384, 10_000)


def build_manager(run_dir: Path, **keys: Any) -> Any:
    """A checkpoint manager for tests."""
    from megatron_md.checkpoint.manager import CheckpointManager

    return CheckpointManager(run_dir, **{"keep_last": 2, "resolved_config": "seed: 1\n", **keys})


def leg(config: Config, run_dir: Path, first: int, stop: int, save: bool, background: bool = False) -> Curve:
    """Train from the newest checkpoint (or from the start) and save; in the background with two steps to go."""
    with small_run(config) as run:
        manager = build_manager(run_dir)
        loaded = manager.load_newest(run.chunks, run.optimizer)
        assert (loaded[1].step if loaded else 0) == first
        curve = run.train(first, stop)
        if save:
            manager.begin(run.chunks, run.optimizer, progress_at(stop), in_background=background)
            if background:
                run.train(stop, stop + 2)
            manager.finish()
        return curve


def legs_config(layout: dict[str, Any], *, tied: bool, precision: str = "fp32") -> Config:
    """12 rows a step, which one, two and three data-parallel ranks can share; sizes that three do not divide."""
    train = {"global_batch_size": 12, "precision": precision}
    return variant(CONFIG, model={"tied": tied}, parallel=layout, train=train)


@cache
def uninterrupted(size: int, layout: str, tied: bool, steps: int = 6, precision: str = "fp32") -> Curve:
    """The curve of a run that nothing disturbs; `layout` in JSON."""
    config = legs_config(json.loads(layout), tied=tied, precision=precision)
    return run_ranks(leg, size, config, Path("/nonexistent"), 0, steps, False)[0]


def cold_start(config: Config, checkpoint: Path, first: int, stop: int) -> Curve:
    """Continue with the checkpoint's weights and a fresh optimizer."""
    with small_run(config) as run:
        build_manager(checkpoint).load_model_only(run.chunks, run.optimizer, checkpoint)
        return run.train(first, stop)

"""Finding a trained run, and what can be refused of it before torch is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_md import run_files
from megatron_md.checkpoint.base import recorded_base
from megatron_md.checkpoint.directory import (
    CONFIG_NAME,
    RECORD_NAME,
    Weights,
    check_weights,
    latest_checkpoint,
    read_progress,
)
from megatron_md.checkpoint.hf.families import FAMILIES
from megatron_md.checkpoint.integrity import read_manifest
from megatron_md.config import ParallelConfig, ResolvedConfig, load_resolved
from megatron_md.errors import UserError
from megatron_md.run.check import check_split

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Placement:
    """Where a run is loaded.

    Attributes:
        tensor: tensor-parallel size; what the pipeline leaves of the world if None. The rest is data-parallel.
        pipeline: pipeline-parallel size.
        device: where to compute.
        trust: see `SavedRun`.
        weights: see `SavedRun`.
    """

    tensor: int | None = None
    pipeline: int = 1
    device: Device = "auto"
    trust: bool = False
    weights: Weights = "model"


@dataclass(frozen=True)
class SavedRun:
    """What a run directory or checkpoint says about itself, before anything is loaded.

    Attributes:
        path: as it was asked for.
        checkpoint: directory with the weights.
        config: its resolved config, with the layout of this job.
        step: optimizer steps that it has seen.
        tokenizer: file of its tokenizer.
        trust: load it even if it has no manifest, and import what its config lists under `imports`.
        weights: the model's, or in place of those that were trained their average (`train.ema_decay`).
    """

    path: Path
    checkpoint: Path
    config: ResolvedConfig
    step: int
    tokenizer: Path
    trust: bool = False
    weights: Weights = "model"

    @property
    def label(self) -> str:
        """What it is called in reports."""
        return str(self.checkpoint) if self.weights == "model" else f"{self.checkpoint} ({self.weights})"


def open_run(path: str | Path, placement: Placement = Placement(), *, world_size: int | None = None) -> SavedRun:
    """Find the newest complete checkpoint of a run directory, or take a checkpoint directory itself.

    Nothing in it is run: its config is data, and `imports` in it are not imported.

    Args:
        path: run directory or checkpoint.
        placement: on which layout and device.
        world_size: processes of the job; those of this one by default.

    Raises:
        UserError: there is none (the message says what was looked for), the base of its adapters is not there or has
            changed, the model cannot be split so, or it has no average of its weights.
        CheckpointError: it has no manifest and is not trusted.
    """
    path = Path(path)
    checkpoint = path if (path / RECORD_NAME).is_file() else latest_checkpoint(path)
    if checkpoint is None:
        raise UserError(_no_run(path))
    if not placement.trust:
        read_manifest(checkpoint)
    check_weights(checkpoint, placement.weights)
    recorded_base(checkpoint)
    config = load_resolved(checkpoint / CONFIG_NAME)
    config = replace(
        config,
        parallel=_layout(world_size or int(os.environ.get("WORLD_SIZE", "1")), placement),
        train=replace(config.train, device=placement.device),
    )
    check_split(config)
    copies = [checkpoint.parent.parent / run_files.TOKENIZER, Path(config.data.tokenizer or "")]
    tokenizer = next((file for file in copies if file.is_file()), None)
    if tokenizer is None:
        raise UserError(f"{path}: its tokenizer is not there (looked for {copies[0]} and {copies[1]})")
    step = read_progress(checkpoint).step
    return SavedRun(path, checkpoint, config, step, tokenizer, placement.trust, placement.weights)


def _no_run(path: Path) -> str:
    if not (path / "config.json").is_file():
        return f"{path}: neither a run directory with a complete checkpoint nor a checkpoint"
    return (
        f"{path}: a folder of Hugging Face; convert it first: "
        f"megatron-md convert {path} runs/{path.resolve().name} --to megatron --family {' or '.join(FAMILIES)}"
    )


def _layout(world_size: int, placement: Placement) -> ParallelConfig:
    tensor, pipeline = placement.tensor or 1, placement.pipeline
    if world_size % (tensor * pipeline):
        raise UserError(
            f"--tensor {tensor} x --pipeline {pipeline} does not divide the {world_size} processes: "
            f"start a multiple of {tensor * pipeline}"
        )
    tensor = placement.tensor or world_size // pipeline
    return ParallelConfig(tensor=tensor, pipeline=pipeline, distributed_optimizer=False)

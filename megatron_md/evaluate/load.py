"""A trained denoiser, ready to be called: from a run directory or a checkpoint, on any number of processes."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch.distributed.checkpoint import CheckpointException

from megatron_md.checkpoint.directory import latest_checkpoint, read_progress, read_record
from megatron_md.checkpoint.families import FAMILIES
from megatron_md.checkpoint.integrity import CheckpointError, read_manifest, verify
from megatron_md.checkpoint.safe_pickle import guarded
from megatron_md.checkpoint.state import load_model
from megatron_md.checks import check_split
from megatron_md.config import Config, ParallelConfig, load_config
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.objective import build_objective
from megatron_md.evaluate.scorer import StepperScorer
from megatron_md.model.build import build_model
from megatron_md.parallel import World
from megatron_md.plugins import import_plugins
from megatron_md.train.denoiser import StepperDenoiser
from megatron_md.train.step import Stepper

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class SavedRun:
    """What a run directory or checkpoint says about itself, before anything is loaded.

    Attributes:
        checkpoint: directory with the weights.
        config: its resolved config, with the layout of this job.
        step: optimizer steps that it has seen.
        tokenizer: file of its tokenizer.
        trust: load it even if it has no manifest, and import what its config lists under `imports`.
    """

    checkpoint: Path
    config: Config
    step: int
    tokenizer: Path
    trust: bool = False


def open_run(
    path: str | Path,
    *,
    world_size: int = 1,
    tensor: int | None = None,
    pipeline: int = 1,
    device: Device = "auto",
    trust: bool = False,
) -> SavedRun:
    """Find the newest complete checkpoint of a run directory, or take a checkpoint directory itself.

    Nothing in it is run: its config is data, and `imports` in it are not imported.

    Args:
        path: run directory or checkpoint.
        world_size: processes of the job.
        tensor: tensor-parallel size; what the pipeline leaves of the world if None. The rest is data-parallel.
        pipeline: pipeline-parallel size.
        device: where to compute.
        trust: see `SavedRun`.

    Raises:
        ValueError: there is none (the message says what was looked for), or the model cannot be split so.
        CheckpointError: it has no manifest and is not trusted.
    """
    path = Path(path)
    checkpoint = path if (path / "progress.json").is_file() else latest_checkpoint(path)
    if checkpoint is None:
        raise ValueError(_no_run(path))
    if not trust:
        read_manifest(checkpoint)
    config = load_config(checkpoint / "config.yaml", [])
    config = replace(
        config,
        parallel=_layout(world_size, tensor, pipeline),
        train=replace(config.train, device=device),
    )
    check_split(config)
    copies = [checkpoint.parent.parent / "tokenizer.model", Path(config.data.tokenizer or "")]
    tokenizer = next((file for file in copies if file.is_file()), None)
    if tokenizer is None:
        raise ValueError(f"{path}: its tokenizer is not there (looked for {copies[0]} and {copies[1]})")
    return SavedRun(checkpoint, config, read_progress(checkpoint).step, tokenizer, trust)


def open_asked(path: str | Path, args: argparse.Namespace) -> SavedRun:
    """`open_run` in this job, as a command's `--tensor --pipeline --device --trust` say."""
    return open_run(
        path,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        tensor=args.tensor,
        pipeline=args.pipeline,
        device=args.device,
        trust=args.trust,
    )


def _no_run(path: Path) -> str:
    if not (path / "config.json").is_file():
        return f"{path}: neither a run directory with a complete checkpoint nor a checkpoint"
    return (
        f"{path}: a folder of Hugging Face; convert it first: "
        f"megatron-md convert {path} runs/{path.resolve().name} --to megatron --family {' or '.join(FAMILIES)}"
    )


def _layout(world_size: int, tensor: int | None, pipeline: int) -> ParallelConfig:
    size = (tensor or 1) * pipeline
    if world_size % size:
        split = f"--tensor {tensor or 1} x --pipeline {pipeline}"
        raise ValueError(f"{split} does not divide the {world_size} processes: start a multiple of {size}")
    return ParallelConfig(tensor=tensor or world_size // pipeline, pipeline=pipeline, distributed_optimizer=False)


def is_causal(run: SavedRun, *, mask_token_id: int) -> bool:
    """Whether a run's denoiser attends to the left only: as its checkpoint recorded, else as its objective says.

    Raises:
        CheckpointError: only third-party modules could tell, and the run is not trusted.
    """
    identity = read_record(run.checkpoint)["identity"]
    if isinstance(identity.get("objective is causal"), bool):
        return bool(identity["objective is causal"])
    if run.config.imports and not run.trust:
        raise CheckpointError(
            f"{run.checkpoint}: its config imports {', '.join(run.config.imports)}, which would run their code here: "
            "--trust allows it"
        )
    import_plugins(run.config)
    return build_objective(run.config.objective, seed=run.config.seed, mask_token_id=mask_token_id).causal


class LoadedDenoiser(StepperDenoiser):
    """The model of a run as a denoiser."""

    def __init__(self, run: SavedRun, world: World, tokenizer: Tokenizer, *, may_be_causal: bool = False) -> None:
        """Verify the checkpoint, build the model and read its weights; every rank does this.

        Raises:
            CheckpointError: the checkpoint is damaged, or cannot be verified and is not trusted.
            ValueError: the run trained a causal model, which denoises nothing, and it may not be one.
        """
        verify(run.checkpoint, trust=run.trust)
        causal = is_causal(run, mask_token_id=tokenizer.mask_token_id)
        if causal and not may_be_causal:
            raise ValueError(f"{run.checkpoint}: an autoregressive baseline cannot denoise; give a diffusion run")
        super().__init__(
            _stepper(run, world, tokenizer, causal=causal),
            mask_token_id=tokenizer.mask_token_id,
            max_length=run.config.model.max_length or run.config.data.seq_length,
        )


def load_scorer(run: SavedRun, world: World, tokenizer: Tokenizer) -> StepperScorer:
    """The model behind `negative_log_likelihoods`, causal or not; every rank does this.

    Raises:
        CheckpointError: the checkpoint is damaged, or cannot be verified and is not trusted.
    """
    verify(run.checkpoint, trust=run.trust)
    causal = is_causal(run, mask_token_id=tokenizer.mask_token_id)
    return StepperScorer(_stepper(run, world, tokenizer, causal=causal))


def _stepper(run: SavedRun, world: World, tokenizer: Tokenizer, *, causal: bool) -> Stepper:
    """The model with its weights read."""
    chunks: list[Any] = build_model(
        run.config, world.device, causal=causal, mask_token_id=tokenizer.mask_token_id, initialize=False
    )
    _load(chunks, run)
    # Scoring asks the objective only if it is causal; a third party's stays where it is.
    name = "autoregressive" if causal else "masked_diffusion"
    keys = replace(run.config.objective, name=name, mask_schedule="uniform:0,1", importance=False, options={})
    objective = build_objective(keys, seed=run.config.seed, mask_token_id=tokenizer.mask_token_id)
    return Stepper(run.config, world, chunks, None, objective)


def _load(chunks: list[Any], run: SavedRun) -> None:
    """Read the weights; what megatron-core makes of files that nothing vouches for is the files' fault."""
    try:
        with guarded(run.checkpoint):
            load_model(chunks, run.checkpoint)
    except (Exception, CheckpointException) as error:
        if not run.trust or isinstance(error, CheckpointError):
            raise
        first_line = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{run.checkpoint}: cannot be loaded ({type(error).__name__}: {first_line})") from error

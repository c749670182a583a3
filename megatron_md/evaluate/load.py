"""A trained denoiser, ready to be called: from a run directory or a checkpoint, on any number of processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint import CheckpointException

from megatron_md.checkpoint.directory import latest_checkpoint, read_progress
from megatron_md.checkpoint.integrity import CheckpointError, read_manifest, verify
from megatron_md.checkpoint.safe_pickle import guarded
from megatron_md.checkpoint.state import load_model
from megatron_md.checks import import_plugins
from megatron_md.config import Config, ParallelConfig, load_config
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.objective import build_objective
from megatron_md.evaluate.scorer import StepperScorer
from megatron_md.model.build import build_model
from megatron_md.parallel import World
from megatron_md.train.step import Stepper

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class SavedRun:
    """What a run directory or checkpoint says about itself, before anything is loaded.

    Attributes:
        checkpoint: directory with the weights.
        config: its resolved config, with the layout that this job has.
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
    path: str | Path, *, world_size: int = 1, pipeline: int = 1, device: Device = "auto", trust: bool = False
) -> SavedRun:
    """Find the newest complete checkpoint of a run directory, or take a checkpoint directory itself.

    Its processes are pipeline stages, `pipeline` of them, and tensor-parallel within each.

    Nothing in it is run: its config is data, and `imports` in it are not imported.

    Raises:
        ValueError: there is none (the message says what was looked for), or `pipeline` does not divide the processes
            or the layers.
        CheckpointError: it has no manifest and is not trusted.
    """
    path = Path(path)
    checkpoint = path if (path / "progress.json").is_file() else latest_checkpoint(path)
    if checkpoint is None:
        raise ValueError(f"{path}: neither a run directory with a complete checkpoint nor a checkpoint")
    if not trust:
        read_manifest(checkpoint)
    config = load_config(checkpoint / "config.yaml", [])
    if world_size % pipeline or config.model.layers % pipeline:
        raise ValueError(
            f"--pipeline {pipeline} must divide the {world_size} process(es) and the {config.model.layers} layers of "
            f"{path}"
        )
    config = replace(
        config,
        parallel=ParallelConfig(tensor=world_size // pipeline, pipeline=pipeline, distributed_optimizer=False),
        train=replace(config.train, device=device),
    )
    copies = [checkpoint.parent.parent / "tokenizer.model", Path(config.data.tokenizer or "")]
    tokenizer = next((file for file in copies if file.is_file()), None)
    if tokenizer is None:
        raise ValueError(f"{path}: its tokenizer is not there (looked for {copies[0]} and {copies[1]})")
    return SavedRun(checkpoint, config, read_progress(checkpoint).step, tokenizer, trust)


def is_causal(run: SavedRun, *, mask_token_id: int) -> bool:
    """Whether a run's denoiser attends to the left only: as its checkpoint recorded, else as its objective says.

    Raises:
        CheckpointError: only third-party modules could tell, and the run is not trusted.
    """
    record = json.loads((run.checkpoint / "progress.json").read_text())
    identity = record.get("identity")
    if isinstance(identity, dict) and isinstance(identity.get("objective is causal"), bool):
        return bool(identity["objective is causal"])
    if run.config.imports and not run.trust:
        raise CheckpointError(
            f"{run.checkpoint}: its config imports {', '.join(run.config.imports)}, which would run their code here: "
            "--trust allows it"
        )
    import_plugins(run.config)
    return build_objective(run.config.objective, seed=run.config.seed, mask_token_id=mask_token_id).causal


class LoadedDenoiser:
    """Calls a model: tokens [B, L] -> logits fp32 [B, L, V], -inf for tokens that it never predicts."""

    def __init__(self, run: SavedRun, world: World, tokenizer: Tokenizer) -> None:
        """Verify the checkpoint, build the model and read its weights; every rank does this.

        Raises:
            CheckpointError: the checkpoint is damaged, or cannot be verified and is not trusted.
            ValueError: the run trained a causal model, which denoises nothing.
        """
        verify(run.checkpoint, trust=run.trust)
        if is_causal(run, mask_token_id=tokenizer.mask_token_id):
            raise ValueError(f"{run.checkpoint}: an autoregressive baseline cannot denoise; give a diffusion run")
        self.max_length = run.config.model.max_length or run.config.data.seq_length
        self.device = world.device
        self._stepper = _stepper(run, world, tokenizer, causal=False)

    def __call__(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Logits at every position; every rank calls this with the same tokens."""
        return self._stepper.logits(tokens_BL)


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

"""A trained denoiser, ready to be called: from a run directory or a checkpoint, on any number of processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_md.checkpoint.manager import latest_checkpoint, load_model, read_progress
from megatron_md.config import Config, ParallelConfig, load_config
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.model.build import build_model
from megatron_md.parallel import World

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class SavedRun:
    """What a run directory or checkpoint says about itself, before anything is loaded.

    Attributes:
        checkpoint: directory with the weights.
        config: its resolved config, with all processes given to tensor parallelism.
        step: optimizer steps that it has seen.
        tokenizer: file of its tokenizer.
    """

    checkpoint: Path
    config: Config
    step: int
    tokenizer: Path


def open_run(path: str | Path, *, world_size: int = 1, device: Device = "auto") -> SavedRun:
    """Find the newest complete checkpoint of a run directory, or take a checkpoint directory itself.

    Raises:
        ValueError: there is none; the message says what was looked for.
    """
    path = Path(path)
    checkpoint = path if (path / "progress.json").is_file() else latest_checkpoint(path)
    if checkpoint is None:
        raise ValueError(f"{path}: neither a run directory with a complete checkpoint nor a checkpoint")
    config = load_config(checkpoint / "config.yaml", [])
    config = replace(
        config,
        parallel=ParallelConfig(tensor=world_size, distributed_optimizer=False),
        train=replace(config.train, device=device),
    )
    copies = [checkpoint.parent.parent / "tokenizer.model", Path(config.data.tokenizer or "")]
    tokenizer = next((file for file in copies if file.is_file()), None)
    if tokenizer is None:
        raise ValueError(f"{path}: its tokenizer is not there (looked for {copies[0]} and {copies[1]})")
    return SavedRun(checkpoint, config, read_progress(checkpoint).step, tokenizer)


class LoadedDenoiser:
    """Calls a model: tokens [B, L] -> logits fp32 [B, L, V], -inf for tokens that it never predicts."""

    def __init__(self, run: SavedRun, world: World, tokenizer: Tokenizer) -> None:
        """Build the model and read its weights.

        Raises:
            ValueError: the run trained a causal model, which denoises nothing.
        """
        if run.config.objective.name == "autoregressive":
            raise ValueError(f"{run.checkpoint}: an autoregressive baseline cannot denoise; give a diffusion run")
        self.max_length = run.config.model.max_length or run.config.data.seq_length
        self.device = world.device
        chunks: list[Any] = build_model(
            run.config, world.device, causal=False, mask_token_id=tokenizer.mask_token_id, initialize=False
        )
        load_model(chunks, run.checkpoint)
        self._model = chunks[0].eval()

    @torch.no_grad()
    def __call__(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Logits at every position."""
        positions_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
        logits_BLV: torch.Tensor = self._model(tokens_BL, positions_BL, None)
        return logits_BLV

"""A small k-parity run for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_md.config.loader import validate
from megatron_md.parity.config import ParityConfig

SMALL: dict[str, dict[str, Any]] = {
    "task": {"n": 6, "k": 2, "train_samples": 40, "valid_samples": 24},
    "accuracy": {"every_steps": 2},
    "uniform_attention": {"hidden": 32},
    "model": {"layers": 2, "hidden": 16, "heads": 2, "ffn": 32, "position": "learned", "init_std": 0.2},
    "objective": {"mask_schedule": "uniform:0,0.5375", "weight": "none", "normalise": "masked"},
    "optimizer": {"lr": 1e-2, "lr_schedule": {"name": "constant"}},
    "train": {"steps": 4, "global_batch_size": 16, "micro_batch_size": 4, "device": "cpu"},
    "log": {"every_steps": 1, "tensorboard": False},
}


def small(
    run_dir: Path | str = "unused", /, *, seed: int = 1, denoiser: str = "transformer", **sections: dict[str, Any]
) -> ParityConfig:
    """`SMALL` with some keys of some sections replaced: `small(task={"k": 3})`."""
    mapping = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {**SMALL, **sections}}
    return validate(ParityConfig, {"run_dir": str(run_dir), "seed": seed, "denoiser": denoiser, **mapping}, "test")

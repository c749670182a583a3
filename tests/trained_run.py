"""The config of the small runs that are evaluated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_md.config import Config
from tests.train.test_trainer import config_for


def run_config(folder: Path, name: str, **sections: dict[str, Any]) -> Config:
    corpora = {split: str(folder / split) for split in ("train", "valid")}
    base = config_for(folder / name, {**corpora, "tokenizer": str(folder / "tokenizer.model")}, **sections)
    return replace(base, model=replace(base.model, vocab=340), train=replace(base.train, steps=2))

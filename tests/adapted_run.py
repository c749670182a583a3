"""A folder of LLaDA, converted, and a run that trains adapters on it: what the tests of adapters start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_md.checkpoint.directory import CONFIG_NAME, find_checkpoint
from megatron_md.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    ResolvedConfig,
    ValidationConfig,
    load_resolved,
)
from tests.checkpoint.hf.test_convert import convert
from tests.checkpoint.hf_models import shape_of, write_model
from tests.ranks import run_ranks
from tests.small_run import LENGTH, VOCAB
from tests.train.test_trainer import pretrain, write_bigram_corpus

KEYS = LoraConfig(rank=4, alpha=12.0)
TENSOR2 = {"tensor": 2, "sequence_parallel": True}


def write_base(folder: Path, *, std: float = 0.05) -> None:
    """FOLDER/hf, a folder of LLaDA, FOLDER/base, the run that it becomes, and FOLDER/train, a corpus."""
    write_model(folder / "hf", "llada", shape_of("llada", vocab=VOCAB), std=std)
    convert(folder / "hf", folder / "base", "llada")
    write_bigram_corpus(folder / "train", 60, 0)


def adapted_config(folder: Path, name: str = "lora", keys: LoraConfig = KEYS, **sections: Any) -> ResolvedConfig:
    """The config of FOLDER/NAME, with adapters on FOLDER/base."""
    base = load_resolved(find_checkpoint(folder / "base") / CONFIG_NAME)
    own = {
        "data": DataConfig(train=str(folder / "train"), seq_length=LENGTH, window_shards=2),
        "optimizer": OptimizerConfig(lr=2e-2),
        "parallel": ParallelConfig(),
        "train": replace(base.train, steps=4, global_batch_size=8, micro_batch_size=2, precision="fp32"),
        "validation": ValidationConfig(sequences=0),
        "checkpoint": CheckpointConfig(every_steps=2, load=str(folder / "base"), load_only="model"),
        "log": LogConfig(every_steps=1, tensorboard=False),
    }
    own |= {section: replace(own[section], **values) for section, values in sections.items()}  # type: ignore[type-var]
    return replace(base, run_dir=str(folder / name), lora=keys, **own)


def train_adapters(folder: Path, name: str = "lora", **sections: Any) -> None:
    """Make FOLDER/NAME on two tensor-parallel ranks with sequence parallelism."""
    assert run_ranks(pretrain, 2, adapted_config(folder, name, parallel=TENSOR2, **sections)) == [0, 0]

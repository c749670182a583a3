"""A training run on made-up rows, small enough for a second, for tests on any layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_md.batch import BatchPosition, CleanBatch
from megatron_md.config import (
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    ResolvedConfig,
    ResolvedModel,
    TrainConfig,
)

ROWS, LENGTH, VOCAB, MASK = 8, 32, 211, 3

CONFIG = ResolvedConfig(
    model=ResolvedModel(vocab=VOCAB, max_length=LENGTH, layers=4, hidden=64, heads=4, kv_heads=2, ffn=96),
    parallel=ParallelConfig(distributed_optimizer=False),
    data=DataConfig(seq_length=LENGTH),
    objective=ObjectiveConfig(mask_schedule="uniform:0.3,0.7", head_chunk=16),
    optimizer=OptimizerConfig(lr=1e-3),
    train=TrainConfig(global_batch_size=ROWS, micro_batch_size=2, precision="fp32"),
)

Curve = list[tuple[float, float, float, float]]


def variant(config: ResolvedConfig = CONFIG, **sections: dict[str, Any]) -> ResolvedConfig:
    """A config with some keys of some sections replaced: `variant(model={"tied": False})`."""
    return replace(config, **{name: replace(getattr(config, name), **keys) for name, keys in sections.items()})


def clean_rows(index: np.ndarray[Any, Any], position: BatchPosition) -> CleanBatch:
    """Rows that are a function of their number; some end in padding, one in each batch has nothing to mask.

    They hold 1 to 6 documents, some of a single token; padding is a document of its own.
    """
    tokens = np.stack([np.random.default_rng(int(g)).integers(4, VOCAB, LENGTH) for g in index])
    is_maskable = np.arange(LENGTH)[None] < np.where(index % 8 == 5, 0, LENGTH - index % 3)[:, None]
    return CleanBatch(tokens, is_maskable, index, position, cu_seqlens=[boundaries(int(g)) for g in index])


def boundaries(g: int) -> np.ndarray[Any, Any]:
    """Where the documents of row g begin, and L."""
    inside = np.random.default_rng((g, 1)).integers(1, LENGTH, g % 5)
    return np.unique([0, *inside, *inside[:1] + 1, LENGTH - g % 3, LENGTH]).clip(max=LENGTH).astype(np.int32)


class SmallRun:
    """Model, optimizer and stepper of one rank."""

    def __init__(self, config: ResolvedConfig, world: Any) -> None:
        from megatron_md.diffusion.objective import build_objective
        from megatron_md.model.build import build_model, wrap_data_parallel
        from megatron_md.train.inference import Inference
        from megatron_md.train.optimizer import build_optimizer, set_hyperparameters
        from megatron_md.train.step import Stepper

        self.config, self.world = config, world
        objective = build_objective(
            config.objective,
            seed=config.seed,
            mask_token_id=MASK,
            within_document=config.data.document_attention == "within_document",
        )
        model = build_model(config, world.device, causal=objective.causal, mask_token_id=MASK)
        self.chunks = wrap_data_parallel(model, config)
        self.optimizer = build_optimizer(config, self.chunks)
        set_hyperparameters(self.optimizer, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)
        self.stepper = Stepper(config, world, self.chunks, self.optimizer, objective)
        self.inference = Inference(config, world, self.chunks, causal=objective.causal, mask_token_id=MASK)

    def batches(self, step: int) -> list[CleanBatch]:
        """This rank's micro-batches of a step."""
        size, rows = self.config.train.micro_batch_size, self.config.train.global_batch_size
        position = BatchPosition(step * rows, rows, min(1.0, step / self.config.train.steps))
        slots = np.arange(rows).reshape(-1, self.world.data_size, size)[:, self.world.data_rank] + step * rows
        return [clean_rows(index, position) for index in slots]

    def train(self, first: int, stop: int) -> Curve:
        """Steps first .. stop - 1: loss, gradient norm, masked cross-entropy and mask rate of each."""
        curve = []
        for step in range(first, stop):
            report = self.stepper.train(self.stepper.corrupt(self.batches(step)))
            curve.append((report.loss, report.grad_norm, report.metrics["masked_ce"], report.metrics["mean_mask_rate"]))
        return curve


@contextmanager
def small_run(config: ResolvedConfig) -> Iterator[SmallRun]:
    """A `SmallRun` in this process's place of the job."""
    from megatron_md import parallel

    with parallel.session(config) as world:
        yield SmallRun(config, world)

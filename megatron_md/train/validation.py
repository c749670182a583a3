"""Full-range validation during training: the same rows, mask counts and masks every time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from megatron_md.batch import BoolArray, CleanBatch, CorruptedBatch, Int32Array, Int64Array
from megatron_md.config import Config
from megatron_md.diffusion.nelbo import (
    NelboEstimate,
    estimate,
    exact_count_corruption,
    micro_batches,
    row_values,
    stratum_order,
)
from megatron_md.parallel import World
from megatron_md.train.callback import Callback, Record
from megatron_md.train.step import Stepper
from megatron_md.train.trainer import Trainer


@dataclass(frozen=True)
class ValidationRows:
    """The rows that a model is validated on.

    Attributes:
        tokens_RL: token ids.
        is_maskable_RL: tokens that are scored.
        cu_seqlens: per row the boundaries of its documents, from 0 to L.
    """

    tokens_RL: Int64Array
    is_maskable_RL: BoolArray
    cu_seqlens: list[Int32Array]


class NelboEvaluator:
    """Scores validation rows: the exact-count NELBO of a denoiser, the exact NLL of a causal model."""

    def __init__(
        self, rows: ValidationRows, stepper: Stepper, world: World, *, seed: int, mask_token_id: int, rate_bins: int
    ) -> None:
        self.rows = rows
        self.stepper = stepper
        self.world = world
        self.seed = seed
        self.mask_token_id = mask_token_id
        self.rate_bins = rate_bins

    def run(self) -> NelboEstimate:
        """The estimate, equal on all ranks; every rank calls this.

        Raises:
            ValueError: the rows hold nothing to score.
        """
        count = len(self.rows.tokens_RL)
        causal = self.stepper.objective.causal
        # value and rate of each row; every row is scored by one data-parallel rank and is 0 on the others.
        table_2R = torch.zeros(2, count, dtype=torch.float64)
        batches = list(
            micro_batches(
                self.rows.tokens_RL,
                self.rows.is_maskable_RL,
                np.arange(count),
                size=self.stepper.micro_batch_size,
                data_rank=self.world.data_rank,
                data_size=self.world.data_size,
                # megatron-core's interleaved schedule takes whole rounds over the pipeline only.
                round_size=self.stepper.round_micro_batches,
                cu_seqlens=self.rows.cu_seqlens,
            )
        )
        corrupted = [self._corrupt(batch, causal) for batch, _ in batches]
        losses = self.stepper.negative_log_likelihoods(corrupted)
        if losses is not None:
            for (batch, is_real_B), masked, nll_M in zip(batches, corrupted, losses, strict=True):
                index = torch.from_numpy(batch.sample_index_B[is_real_B])
                table_2R[0, index] = torch.from_numpy(row_values(nll_M, masked)[is_real_B])
                table_2R[1, index] = torch.from_numpy(masked.mask_rate_B[is_real_B].astype(np.float64))
        values_R, rate_R = self.stepper.sum_over_ranks(table_2R).numpy()
        return estimate(
            values_R,
            self.rows.is_maskable_RL.sum(axis=1).astype(np.int64),
            rate_R,
            None if causal else stratum_order(count, seed=self.seed),
            rate_bins=self.rate_bins,
        )

    def _corrupt(self, batch: CleanBatch, causal: bool) -> CorruptedBatch:
        if causal:
            return self.stepper.corrupt([batch])[0]
        corrupted = exact_count_corruption(batch, seed=self.seed, mask_token_id=self.mask_token_id)
        return self.stepper.keep_apart(batch, corrupted)


def nelbo_record(result: NelboEstimate) -> Record:
    """An estimate under the names of `metrics.jsonl`."""
    return {
        "val_nelbo": result.nelbo,
        "val_nelbo_stderr": result.stderr,
        "val_ppl_bound": result.ppl_bound,
        "val_ce_by_rate": [value if math.isfinite(value) else None for value in result.ce_by_rate],
    }


class Validation(Callback):
    """Validates every `validation.every_steps` steps and after the last one."""

    def __init__(self, config: Config, evaluator: NelboEvaluator) -> None:
        self.every = config.validation.every_steps
        self.last_step = config.train.steps
        self.evaluator = evaluator
        self.newest: NelboEstimate | None = None

    def after_step(self, trainer: Trainer, record: Record) -> None:
        """Validate where it is due and add the figures to the record."""
        step = trainer.progress.step
        if step == self.last_step or (self.every and step % self.every == 0):
            self.newest = self.evaluator.run()
            record.update(nelbo_record(self.newest))

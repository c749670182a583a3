"""Full-range validation during training: the same rows, mask counts and masks every time."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

from megatron_md import run_files
from megatron_md.config import Config
from megatron_md.diffusion.estimators import Estimator, EstimatorName
from megatron_md.diffusion.nelbo import NelboTable, evaluate_nelbo
from megatron_md.diffusion.scoring import ScoredRows, Scorer
from megatron_md.files import replace_file
from megatron_md.messages import tell
from megatron_md.train import ema
from megatron_md.train.callback import Callback, Record, StepResult
from megatron_md.train.trainer import Trainer


def nelbo_record(table: NelboTable, rate_bins: int) -> Record:
    """A table's figures as in `metrics.jsonl`; a bin of the rate, ((k-1)/K, k/K], that holds no row is None."""
    report = table.report()
    points = [] if table.estimator.block_size else table.curve(rate_bins)
    ce_by_bin = {math.ceil(point.rate * rate_bins - 1e-9): point.ce for point in points}
    by_rate = [ce_by_bin.get(k, math.nan) for k in range(1, rate_bins + 1)]
    return {
        "val_nelbo": report.nelbo,
        "val_nelbo_stderr": report.stderr,
        "val_ppl_bound": report.ppl_bound,
        "val_ce_by_rate": [value if math.isfinite(value) else None for value in by_rate],
    }


class Validation(Callback):
    """Validates every `validation.every_steps` steps and after the last one, on the same rows with the same masks.

    Attributes:
        newest: the figures that were found last.
    """

    def __init__(self, config: Config, scorer: Scorer, rows: ScoredRows, *, mask_token_id: int) -> None:
        self.keys, self.last_step = config.validation, config.train.steps
        self.directory, self.may_be_lost = Path(config.run_dir), config.checkpoint.on_error == "continue"
        self.scorer, self.rows, self.mask_token_id = scorer, rows, mask_token_id
        self.newest: Record = {}

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Validate where it is due and add the figures to the record."""
        step = trainer.progress.step
        if step == self.last_step or (self.keys.every_steps and step % self.keys.every_steps == 0):
            uses_average = self.keys.weights == "ema"
            with ema.in_model(trainer.optimizer, trainer.stepper.chunks) if uses_average else nullcontext():
                table = self.validate()
            self.newest = nelbo_record(table, self.keys.rate_bins)
            result.record.update(self.newest)
            if trainer.world.is_main:
                self._keep(json.dumps({"step": step, **table.by_row()}) + "\n")

    def _keep(self, rows: str) -> None:
        path = self.directory / run_files.VALIDATION
        try:
            replace_file(path, rows)
        except OSError as error:
            if not self.may_be_lost:
                raise
            tell(f"megatron-md: {path} cannot be written ({error.strerror}): the rows of a validation are lost")

    def validate(self) -> NelboTable:
        """The exact-count NELBO of a denoiser, or the exact cross-entropy of a causal model; equal on all ranks."""
        name: EstimatorName = "autoregressive" if self.scorer.causal else "exact"
        is_shifted = self.scorer.causal and self.scorer.right_shift
        estimator = Estimator(name, self.keys.seed, right_shift=is_shifted, block_size=self.scorer.block_size)
        return evaluate_nelbo(self.scorer, self.rows, estimator, mask_token_id=self.mask_token_id, may_be_infinite=True)

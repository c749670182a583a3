"""The exact discrete NELBO of any model on fixed rows: passes of an estimator until it is precise enough.

For a row of n scored tokens and a denoiser p, averaging the chain rule over all orders of the tokens gives

    -log p(x) <= n * E_{l ~ U{1..n}} E_{l positions masked} [ mean over the masked i of -log p(x_i | the others) ]

(Uria et al. 2014; Ou et al. 2025), with equality when the conditionals belong to one joint law. So the value of a row
is its mean cross-entropy at exactly l masked positions: no weights, no smallest t. Rows enter by their tokens: NELBO
per token = sum_i n_i v_i / sum_i n_i. Validation in training and `evaluate --nelbo` are both

    table = evaluate_nelbo(scorer, ScoredRows(tokens_RL, is_maskable_RL), Estimator("exact"), mask_token_id=...)
    print(table.report().nelbo)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_md.batch import Int64Array
from megatron_md.diffusion.corruption import FloatArray
from megatron_md.diffusion.estimators import Estimator, Plan, neyman_density
from megatron_md.diffusion.nelbo_error import CurvePoint, curve, mask_stderr, total_stderr, weighted_mean
from megatron_md.diffusion.scoring import ScoredRows, Scorer
from megatron_md.errors import UserError

_MICRO_BATCHES_AT_ONCE = 16


@dataclass(frozen=True)
class NelboReport:
    """A NELBO and how sure it is.

    Attributes:
        nelbo: nats per token.
        stderr: its standard error from the choice of rows and masks; nan with a single row.
        mask_stderr: the part from the masks, which more passes make smaller; nan after one pass, 0 for causal models.
        ppl_bound: exp(nelbo), an upper bound on the perplexity (the perplexity itself of a causal model).
        bits_per_byte: where the bytes are known.
        word_ppl: exp(nats of all tokens / words) where the words are known; an upper bound as `ppl_bound`.
        words: of the text as it was given.
        bytes: of the text that was scored, where they are known.
        tokens: scored tokens.
        rows: rows with any.
        passes: over the rows.
        forward_passes: masked rows that went through the model.
        ce_by_rate: cross-entropy as a function of the mask rate.
    """

    nelbo: float
    stderr: float
    mask_stderr: float
    ppl_bound: float
    bits_per_byte: float | None
    word_ppl: float | None
    words: int | None
    bytes: int | None
    tokens: int
    rows: int
    passes: int
    forward_passes: int
    ce_by_rate: list[CurvePoint]


@dataclass(frozen=True)
class NelboDifference:
    """NELBO of one model less that of another on the same rows (and, where both are masked, the same masks).

    Attributes:
        difference: nats per token; negative where the first is better.
        stderr: its standard error from rows and masks.
        mask_stderr: the part from the masks.
        passes: compared.
    """

    difference: float
    stderr: float
    mask_stderr: float
    passes: int


class NelboTable:
    """Everything an evaluation found so far: the summed cross-entropy of each row's draws, pass by pass."""

    def __init__(self, rows: ScoredRows, estimator: Estimator) -> None:
        self.estimator = estimator
        self.maskable_R = rows.maskable_R
        self.bytes, self.words = rows.bytes, rows.words
        self.fingerprint = rows.fingerprint
        # [draws, R] of each pass; nan where a row has not been scored.
        self.sums: list[FloatArray] = []
        self._plan_of_pass: list[Plan] = []

    def open_rows(self, randomisation: int) -> Int64Array:
        """Rows that a pass has not scored yet."""
        while len(self.sums) <= randomisation:
            self.sums.append(np.full((self.estimator.draws, len(self.maskable_R)), np.nan))
        return np.flatnonzero(np.isnan(self.sums[randomisation]).any(axis=0)).astype(np.int64)

    def record(self, randomisation: int, index_C: Int64Array, sums_DC: FloatArray) -> None:
        """Add what a pass found for some rows.

        A cross-entropy that is not a number counts as infinite: nan stands for what has not been scored.
        """
        self.sums[randomisation][:, index_C] = np.where(np.isnan(sums_DC), np.inf, sums_DC)

    @property
    def passes(self) -> int:
        """Complete passes; those after the first incomplete one do not count."""
        complete = [not np.isnan(sums).any() for sums in self.sums]
        return complete.index(False) if False in complete else len(complete)

    def state(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        passes = [[[None if math.isnan(x) else x for x in row] for row in sums.tolist()] for sums in self.sums]
        return {"rows": self.fingerprint, "estimator": asdict(self.estimator), "passes": passes}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()` of an evaluation of the same rows.

        Raises:
            UserError: it belongs to other rows or another estimator.
        """
        if state["rows"] != self.fingerprint:
            raise UserError("the saved evaluation scored other rows; start it anew")
        own = {**asdict(self.estimator), "density": list(self.estimator.density)}
        if state["estimator"] != own:
            raise UserError(f"the saved evaluation used {state['estimator']}, not {own}; start it anew")
        shape = self.estimator.draws, len(self.maskable_R)
        if any(len(rows) != shape[0] or any(len(row) != shape[1] for row in rows) for rows in state["passes"]):
            raise UserError(f"the saved evaluation holds passes of another shape than {shape}; start it anew")
        self.sums = [np.array(rows, dtype=np.float64) for rows in state["passes"]]

    def _plans(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(rate_PDR, weight_PDR, strata_PR) of the complete passes."""
        rows = len(self.maskable_R)
        for number in range(len(self._plan_of_pass), self.passes):
            self._plan_of_pass.append(self.estimator.plan(np.arange(rows), self.maskable_R, rows, number))
        plans = self._plan_of_pass[: self.passes]
        return (
            np.stack([plan.rate_DB for plan in plans]),
            np.stack([plan.weight_DB for plan in plans]),
            np.stack([plan.stratum_B for plan in plans]),
        )

    def _complete_sums(self) -> FloatArray:
        if self.passes == 0:
            raise UserError("no pass over the rows is complete")
        return np.stack(self.sums[: self.passes])

    def values_PR(self) -> FloatArray:
        """Value per token of each row in each complete pass.

        Raises:
            UserError: there is none.
        """
        return np.asarray((self._complete_sums() * self._plans()[1]).sum(axis=1))

    def by_row(self) -> dict[str, Any]:
        """What a comparison of models row by row needs, as JSON can hold it.

        Returns:
            `rows`: hash of the rows; `tokens`: scored tokens n of each; `rate`: mask rate of each row's first draw (1
            for a causal model); `nelbo`: nats per token of each, the mean over passes, None where it is not finite.
        """
        value_R = self.values_PR().mean(axis=0)
        return {
            "rows": self.fingerprint,
            "tokens": self.maskable_R.tolist(),
            "rate": self._plans()[0][0, 0].tolist(),
            "nelbo": [value if math.isfinite(value) else None for value in value_R.tolist()],
        }

    def strata_PR(self) -> FloatArray | None:
        """The uniform behind each rate, where rates are stratified."""
        return self._plans()[2] if self.estimator.stratified else None

    def mask_stderr(self) -> float:
        """See `NelboReport.mask_stderr`."""
        if self.estimator.causal:
            return 0.0
        return mask_stderr(self.values_PR(), self.strata_PR(), self.maskable_R)

    def curve(self, bins: int = 20) -> list[CurvePoint]:
        """Cross-entropy as a function of the mask rate; see `nelbo_error.curve`."""
        sums_PDR, (rate_PDR, _, _) = self._complete_sums(), self._plans()
        ce_PDR = sums_PDR / np.maximum(rate_PDR * np.maximum(self.maskable_R, 1), 1e-300)
        return curve(ce_PDR, rate_PDR, self.maskable_R, bins)

    def neyman_density(self, bins: int = 10) -> tuple[float, ...]:
        """The density for the estimator `neyman`, this table being the pilot; see `estimators.neyman_density`.

        Raises:
            UserError: the pilot is not one of `exact`.
        """
        if self.estimator.name != "exact":
            raise UserError(f"a pilot for neyman must use the estimator exact, not {self.estimator.name}")
        values_PR, (rate_PDR, _, _) = self.values_PR(), self._plans()
        tokens_PR = np.broadcast_to(self.maskable_R, values_PR.shape)
        return neyman_density(values_PR.ravel(), rate_PDR[:, 0].ravel(), tokens_PR.ravel(), bins=bins)

    def report(self, *, rate_bins: int = 20) -> NelboReport:
        """The estimate from the complete passes.

        Raises:
            UserError: there is none.
        """
        values_PR = self.values_PR()
        nelbo, tokens = weighted_mean(values_PR, self.maskable_R), int(self.maskable_R.sum())
        return NelboReport(
            nelbo=nelbo,
            stderr=total_stderr(values_PR, self.strata_PR(), self.maskable_R),
            mask_stderr=self.mask_stderr(),
            ppl_bound=_exp(nelbo),
            bits_per_byte=nelbo * tokens / (math.log(2.0) * self.bytes) if self.bytes else None,
            word_ppl=_exp(nelbo * tokens / self.words) if self.words else None,
            words=self.words,
            bytes=self.bytes,
            tokens=tokens,
            rows=int(np.count_nonzero(self.maskable_R)),
            passes=self.passes,
            forward_passes=int(np.count_nonzero(self._plans()[0])),
            ce_by_rate=[] if self.estimator.causal or self.estimator.block_size else self.curve(rate_bins),
        )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700.0 else math.inf


def evaluate_nelbo(
    scorer: Scorer,
    rows: ScoredRows,
    estimator: Estimator,
    *,
    mask_token_id: int,
    passes: int = 1,
    stderr: float | None = None,
    max_passes: int = 1000,
    state: dict[str, Any] | None = None,
    on_progress: Callable[[NelboTable], None] | None = None,
    may_be_infinite: bool = False,
) -> NelboTable:
    """Score the rows in passes with independent masks; every rank calls this and gets the same table.

    Args:
        scorer: the model.
        rows: what to score.
        estimator: how.
        mask_token_id: what masked positions become (the BOS of a causal model).
        passes: how many at least.
        stderr: go on until the standard error from the masks is at most this (nats per token).
        max_passes: stop there in any case.
        state: `NelboTable.state()` of an evaluation to go on with.
        on_progress: called after every few micro-batches, to save the state or move a bar.
        may_be_infinite: accept a model that gives a token no chance, or gives no number.

    Raises:
        UserError: the estimator does not fit the model, a number is out of range, the state is of another run, or the
            model's cross-entropy is not finite.
    """
    if scorer.causal != estimator.causal:
        right = "'autoregressive'" if scorer.causal else "one for a denoiser, such as 'exact'"
        raise UserError(f"estimator {estimator.name!r} does not fit this model; choose {right}")
    if scorer.block_size != estimator.block_size:
        raise UserError(
            f"the model's blocks are of {scorer.block_size} tokens, the estimator's of {estimator.block_size}"
        )
    check_passes(passes, stderr, max_passes)
    table = NelboTable(rows, estimator)
    if state is not None:
        table.load_state(state)
    number = 0
    while number < passes or _is_wanted(table, number, stderr, max_passes):
        for index_C in _score_pass(scorer, rows, table, number, mask_token_id):
            if not may_be_infinite:
                _check_finite(table.sums[number][:, index_C], index_C)
            if on_progress is not None:
                on_progress(table)
        number += 1
    return table


def check_passes(passes: int, stderr: float | None, max_passes: int) -> None:
    """Check how often the rows are to be scored.

    Raises:
        UserError: a number is out of range.
    """
    if passes < 1 or max_passes < passes:
        raise UserError(f"passes must be at least 1 and at most max_passes {max_passes}, got {passes}")
    if stderr is not None and not stderr > 0.0:
        raise UserError(f"stderr must be positive, got {stderr}")


def _is_wanted(table: NelboTable, number: int, stderr: float | None, max_passes: int) -> bool:
    """Whether pass `number` is to be made for the sake of the precision."""
    if stderr is None or number >= max_passes or table.estimator.causal:
        return False
    return number < 2 or table.passes > number or not table.mask_stderr() <= stderr


def _check_finite(sums_DC: FloatArray, index_C: Int64Array) -> None:
    is_bad_C = ~np.isfinite(sums_DC).all(axis=0)
    if is_bad_C.any():
        raise UserError(
            f"row {int(index_C[is_bad_C.argmax()])}: the model's cross-entropy is not finite; its weights are damaged, "
            "or the row holds a token that the model never predicts"
        )


def _score_pass(
    scorer: Scorer, rows: ScoredRows, table: NelboTable, number: int, mask_token_id: int
) -> Iterator[Int64Array]:
    """Score what a pass still lacks, a few micro-batches at a time; yields the rows of each time."""
    open_R = table.open_rows(number)
    size = scorer.micro_batch_size * scorer.data_size * _MICRO_BATCHES_AT_ONCE
    draws = table.estimator.draws
    for index_C in np.split(open_R, range(size, len(open_R), size)):
        if not len(index_C):
            continue
        parts = [
            (batch, is_real_B, draw, replace(masked, cu_seqlens=batch.cu_seqlens))
            for batch, is_real_B in rows.micro_batches(index_C, scorer)
            for draw, masked in enumerate(table.estimator.corrupt(batch, mask_token_id, number))
        ]
        # Every row is scored by one data-parallel rank and is 0 on the others.
        sums_DR = torch.zeros(draws, len(table.maskable_R), dtype=torch.float64)
        losses = scorer.negative_log_likelihoods([masked for *_, masked in parts])
        for (batch, is_real_B, draw, masked), nll_M in zip(parts, losses or [], strict=losses is not None):
            row_M = masked.positions_M // masked.tokens_BL.shape[1]
            # Within a row, blocks have weights of their own; otherwise the plan has the row's.
            found_M = nll_M if table.estimator.block_size is None else nll_M.astype(np.float64) * masked.weights_M
            sum_B = np.bincount(row_M, found_M, minlength=len(is_real_B)).astype(np.float64)
            sums_DR[draw, torch.from_numpy(batch.sample_index_B[is_real_B])] = torch.from_numpy(sum_B[is_real_B])
        table.record(number, index_C, scorer.sum_over_ranks(sums_DR[:, torch.from_numpy(index_C)]).numpy())
        yield index_C


def difference(first: NelboTable, second: NelboTable) -> NelboDifference:
    """Compare two models row by row, which takes out what their rows and masks have in common.

    A causal model's exact values are set against every pass of the other.

    Raises:
        UserError: the tables have other rows, or draw other masks.
    """
    if first.fingerprint != second.fingerprint:
        raise UserError("the two models were evaluated on different rows; use the same data and row length")
    masked = [table for table in (first, second) if not table.estimator.causal]
    if len(masked) == 2 and first.estimator != second.estimator:
        raise UserError("the two models were evaluated with different estimators or seeds; use the same for both")
    passes = min((table.passes for table in masked), default=1)
    one, two = (t.values_PR()[: 1 if t.estimator.causal else passes] for t in (first, second))
    values_PR, maskable_R = one - two, first.maskable_R
    strata_PR = masked[0].strata_PR() if masked else None
    strata_PR = strata_PR[:passes] if strata_PR is not None else None
    return NelboDifference(
        difference=weighted_mean(values_PR, maskable_R),
        stderr=total_stderr(values_PR, strata_PR, maskable_R),
        mask_stderr=mask_stderr(values_PR, strata_PR, maskable_R) if masked else 0.0,
        passes=passes,
    )

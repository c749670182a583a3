"""Validation scores the model as it is trained: with attention over rows, or within their documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.batch import CorruptedBatch
from megatron_md.config import Config
from megatron_md.diffusion.scoring import ScoredRows
from megatron_md.train.callbacks.validation import Validation, nelbo_record
from tests.ranks import run_ranks
from tests.small_run import CONFIG, LENGTH, MASK, VOCAB, small_run, variant


def nelbos(config: Config) -> tuple[float, float, int]:
    """NELBO of rows of two documents, and of one padded row per document; and the scored tokens."""

    rows = 5
    generator = np.random.default_rng(0)
    tokens = generator.integers(4, VOCAB, (rows, LENGTH))
    cuts = generator.integers(1, LENGTH, rows)
    alone = np.zeros((2 * rows, LENGTH), dtype=np.int64)
    is_maskable = np.zeros_like(alone, dtype=bool)
    for row, cut in enumerate(cuts.tolist()):
        for number, document in enumerate((tokens[row, :cut], tokens[row, cut:])):
            alone[2 * row + number, : len(document)] = document
            is_maskable[2 * row + number, : len(document)] = True
    pairs = [np.array([0, cut, LENGTH], dtype=np.int32) for cut in cuts]
    singles = [np.array([0, count, LENGTH], dtype=np.int32) for count in is_maskable.sum(axis=1)]
    with small_run(config) as run:

        def nelbo(of: ScoredRows) -> float:
            return Validation(config, run.inference, of, mask_token_id=MASK).validate().report().nelbo

        together = nelbo(ScoredRows(tokens, np.ones_like(tokens, dtype=bool), cu_seqlens=pairs))
        return together, nelbo(ScoredRows(alone, is_maskable, cu_seqlens=singles)), int(is_maskable.sum())


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
def test_documents_that_are_kept_apart_cost_what_they_cost_alone(size: int) -> None:
    keys = {"objective": {"name": "autoregressive"}, "parallel": {"pipeline": size}}
    within = variant(CONFIG, data={"document_attention": "within_document"}, **keys)
    for together, alone, tokens in run_ranks(nelbos, size, within):
        assert tokens == 5 * LENGTH
        assert together == pytest.approx(alone, rel=1e-6)
    together, alone, _ = run_ranks(nelbos, size, variant(CONFIG, **keys))[0]
    assert abs(together / alone - 1) > 1e-5


class LogV:
    """A model of which nothing is known but that all V tokens are equally likely; `nats` for each."""

    causal = right_shift = within_document = False
    block_size: int | None = None
    micro_batch_size, data_rank, data_size = 2, 0, 1

    def __init__(self, nats: float) -> None:
        self.nats = nats

    def negative_log_likelihoods(self, batches: Sequence[CorruptedBatch]) -> list[np.ndarray]:
        return [np.full(len(batch.positions_M), self.nats) for batch in batches]

    def sum_over_ranks(self, figures: torch.Tensor) -> torch.Tensor:
        return figures


def validated(nats: float, **keys: Any) -> dict[str, Any]:
    rows = ScoredRows(np.zeros((6, LENGTH), dtype=np.int64), np.ones((6, LENGTH), dtype=bool))
    config = variant(CONFIG, validation={"rate_bins": 4, **keys})
    table = Validation(config, LogV(nats), rows, mask_token_id=MASK).validate()
    return nelbo_record(table, config.validation.rate_bins)


def test_a_uniform_model_has_log_v_at_every_rate() -> None:
    record = validated(math.log(7))
    assert record["val_nelbo"] == pytest.approx(math.log(7))
    assert record["val_nelbo_stderr"] == pytest.approx(0.0, abs=1e-12)
    assert record["val_ppl_bound"] == pytest.approx(7.0)
    assert record["val_ce_by_rate"] == pytest.approx([math.log(7)] * 4)
    assert validated(math.log(7), rate_bins=12)["val_ce_by_rate"].count(None) >= 6  # six rows have six rates


@pytest.mark.parametrize("nats", [math.nan, math.inf])
def test_a_broken_model_ends_nothing(nats: float) -> None:
    record = validated(nats)
    assert not math.isfinite(record["val_nelbo"])
    assert record["val_ce_by_rate"] == [None] * 4

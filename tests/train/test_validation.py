"""Validation scores the model as it is trained: with attention over rows, or within their documents."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_md.config import Config
from tests.ranks import run_ranks
from tests.small_run import CONFIG, LENGTH, MASK, VOCAB, small_run, variant


def nelbos(config: Config) -> tuple[float, float, int]:
    """NELBO of rows of two documents, and of one padded row per document; and the scored tokens."""
    from megatron_md.train.validation import NelboEvaluator, ValidationRows

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

        def nelbo(of: ValidationRows) -> float:
            return NelboEvaluator(of, run.stepper, run.world, seed=1, mask_token_id=MASK, rate_bins=4).run().nelbo

        together = nelbo(ValidationRows(tokens, np.ones_like(tokens, dtype=bool), pairs))
        return together, nelbo(ValidationRows(alone, is_maskable, singles)), int(is_maskable.sum())


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

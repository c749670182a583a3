"""Rows to evaluate on: of a chat corpus the answers count, given all that is not an answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.batch import CorruptedBatch
from megatron_md.config import ChatConfig, Config, DataConfig
from megatron_md.diffusion.estimators import Estimator
from megatron_md.diffusion.nelbo import evaluate_nelbo
from megatron_md.evaluate.rows import evaluation_rows
from tests.data.small_chat import all_dialogues, random_dialogues, write_chat_corpus
from tests.data.small_corpus import EOS, MASK, PAD

VOCAB = 200
TOKENIZER: Any = SimpleNamespace(sha256="0" * 64, path="tokenizer", decode=lambda tokens: "x" * len(tokens))


class Uniform:
    """A model that knows nothing, and remembers what it was asked."""

    causal, right_shift, within_document = False, False, False
    block_size: int | None = None
    micro_batch_size, data_rank, data_size = 4, 0, 1

    def __init__(self) -> None:
        self.batches: list[CorruptedBatch] = []

    def negative_log_likelihoods(self, batches: Sequence[CorruptedBatch]) -> list[np.ndarray[Any, Any]]:
        self.batches += batches
        return [np.full(len(batch.positions_M), math.log(VOCAB)) for batch in batches]

    def sum_over_ranks(self, figures: torch.Tensor) -> torch.Tensor:
        return figures


@pytest.mark.parametrize(("padding", "eos"), [("answer", 1), ("one", 1), ("ignore", 0)])
@pytest.mark.parametrize("estimator", ["exact", "complementary"])
def test_the_nelbo_of_a_chat_corpus_is_that_of_answers(tmp_path: Path, padding: Any, eos: int, estimator: Any) -> None:
    corpus = write_chat_corpus(tmp_path / "corpus", random_dialogues(17, longest=30))
    config = Config(data=DataConfig(seq_length=64, chat=ChatConfig(eos_padding=padding)))
    rows = evaluation_rows([str(tmp_path / "corpus")], [config, Config()], TOKENIZER, count=100)
    model = Uniform()
    report = evaluate_nelbo(model, rows, Estimator(estimator), mask_token_id=MASK, passes=2).report()
    assert (report.tokens, report.rows) == (corpus.answer_tokens + 17 * eos, 17)
    assert report.nelbo == pytest.approx(math.log(VOCAB), rel=1e-12)
    prompts = {tuple(tokens): runs for tokens, runs in all_dialogues(corpus)}
    for batch in model.batches:
        assert batch.cu_seqlens is not None, "padding is hidden from a model that attends to whole rows"
        length = batch.tokens_BL.shape[1]
        clean_BL = batch.tokens_BL.copy()
        clean_BL.reshape(-1)[batch.positions_M] = batch.targets_M
        for row in np.unique(batch.positions_M // length).tolist():
            end = int(batch.cu_seqlens[row][1])
            tokens = clean_BL[row, : end - eos].tolist()
            assert clean_BL[row, end - eos :].tolist() == [EOS] * eos + [PAD] * (length - end)
            answers = {place for run in prompts[tuple(tokens)] for place in range(*run)} | {*range(end - eos, end)}
            assert set(np.flatnonzero(batch.tokens_BL[row] == MASK).tolist()) <= answers

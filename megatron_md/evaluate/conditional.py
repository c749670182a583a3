"""log p(answer | prompt) of questions with several answers, by any model on any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from megatron_md.batch import CorruptedBatch
from megatron_md.diffusion.conditional import ConditionalEstimator, MaskedAnswers, masked_answers
from megatron_md.diffusion.corruption import FloatArray
from megatron_md.evaluate.scorer import Scorer


@dataclass(frozen=True)
class Question:
    """A prompt and the answers to choose from, as token ids."""

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]


@dataclass(frozen=True)
class AnswerLikelihood:
    """What was found for one answer.

    Attributes:
        log_likelihood: log p(answer | prompt) in nats (a lower bound in expectation under `monte_carlo`).
        stderr: its standard error from the masks; 0 where nothing is random.
        forward_passes: rows that went through the model.
    """

    log_likelihood: float
    stderr: float
    forward_passes: int


def conditional_log_likelihoods(
    scorer: Scorer,
    questions: Sequence[Question],
    estimator: ConditionalEstimator,
    *,
    mask_token_id: int,
    max_length: int | None = None,
) -> list[list[AnswerLikelihood]]:
    """Score every answer of every question; every rank calls this and gets the same figures.

    Data-parallel ranks share the questions. Rows of a call have one length, without padding, since a denoiser would
    read padding as text.

    Args:
        scorer: the model.
        questions: what to score.
        estimator: how.
        mask_token_id: what masked positions become (the BOS of a causal model).
        max_length: the model's context, checked before anything is scored.

    Raises:
        ValueError: an answer is empty or does not fit into the context with its prompt, the prompt or answer contains
            the mask token, or the estimator does not fit the model.
    """
    if scorer.causal != estimator.causal:
        right = "'autoregressive'" if scorer.causal else "'monte_carlo' or 'left_to_right'"
        raise ValueError(f"method {estimator.method!r} does not fit this model; choose {right}")
    for number, question in enumerate(questions):
        _check(number, question, mask_token_id, max_length)
    first = np.cumsum([0, *(len(question.answers) for question in questions)])
    table_3A = torch.zeros(3, int(first[-1]), dtype=torch.float64)
    for number in range(scorer.data_rank, len(questions), scorer.data_size):
        question = questions[number]
        for at, answer in enumerate(question.answers):
            copies = masked_answers(question.prompt, answer, estimator, mask_token_id=mask_token_id, question=number)
            sum_D = _summed_cross_entropies(scorer, copies)
            if sum_D is not None:
                figures = [*copies.log_likelihood(sum_D), float(len(copies.tokens_DL))]
                table_3A[:, first[number] + at] = torch.tensor(figures, dtype=torch.float64)
    columns = scorer.sum_over_ranks(table_3A).T.tolist()
    found = [AnswerLikelihood(value, stderr, int(passes)) for value, stderr, passes in columns]
    return [found[start:end] for start, end in pairwise(first.tolist())]


def _check(number: int, question: Question, mask_token_id: int, max_length: int | None) -> None:
    for at, answer in enumerate(question.answers):
        where = f"question {number}, answer {at}"
        if not len(answer):
            raise ValueError(f"{where}: an answer without tokens has no likelihood")
        if mask_token_id in [*question.prompt, *answer]:
            raise ValueError(f"{where}: the text contains the mask token ({mask_token_id})")
        if max_length is not None and len(question.prompt) + len(answer) > max_length:
            raise ValueError(
                f"{where}: the prompt's {len(question.prompt)} tokens and the answer's {len(answer)} exceed the "
                f"model's {max_length} positions; shorten the prompt"
            )


def _summed_cross_entropies(scorer: Scorer, copies: MaskedAnswers) -> FloatArray | None:
    """Of each copy; None on ranks that do not hold the last pipeline stage."""
    batches: list[CorruptedBatch] = list(copies.micro_batches(scorer.micro_batch_size))
    real = len(batches)
    # megatron-core's interleaved schedule takes whole rounds over the pipeline only.
    batches += [batches[0]] * (-real % scorer.round_micro_batches)
    losses = scorer.negative_log_likelihoods(batches)
    if losses is None:
        return None
    sums = [
        np.bincount(batch.positions_M // batch.tokens_BL.shape[1], nll_M, minlength=scorer.micro_batch_size)
        for batch, nll_M in zip(batches[:real], losses[:real], strict=True)
    ]
    return np.concatenate(sums)[: len(copies.tokens_DL)].astype(np.float64)

"""log p(answer | prompt) of questions with several answers, log p of whole documents, by any model on any layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from megatron_md.batch import BoolArray, CorruptedBatch
from megatron_md.diffusion.conditional import ConditionalEstimator, MaskedAnswers, masked_answers
from megatron_md.diffusion.corruption import FloatArray
from megatron_md.diffusion.scoring import GuidedScorer
from megatron_md.errors import UserError


@dataclass(frozen=True)
class Question:
    """A prompt and the answers to choose from, as token ids.

    Attributes:
        prompt: what is given.
        answers: what is scored.
        key: random draws hang on it; its place in the list if None. Questions with one key share their draws.
    """

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]
    key: int | None = None


@dataclass(frozen=True)
class AnswerLikelihood:
    """What was found for one answer.

    Attributes:
        log_likelihood: log p(answer | prompt) in nats (a lower bound in expectation under `monte_carlo`).
        stderr: its standard error from the masks; 0 where nothing is random.
        forward_passes: rows that went through the model, those without the prompt included.
        halves: the log-likelihood by the first and by the second half of the draws, alike where nothing is random;
            None where there are too few draws.
    """

    log_likelihood: float
    stderr: float
    forward_passes: int
    halves: tuple[float, float] | None = None


def conditional_log_likelihoods(
    scorer: GuidedScorer,
    questions: Sequence[Question],
    estimator: ConditionalEstimator,
    *,
    mask_token_id: int,
    max_length: int | None = None,
    on_question: Callable[[], None] = lambda: None,
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
        on_question: called after each question of this rank's share.

    Raises:
        UserError: an answer is empty or does not fit into the context with its prompt, the prompt or answer contains
            the mask token, a prompt is empty whose answer's first token nothing predicts then, or the estimator does
            not fit the model.
    """
    if scorer.block_size is not None and estimator.guidance:
        raise UserError("guidance needs logits without the prompt, which a block model was not trained for; set 0")
    if scorer.causal != estimator.causal:
        right = "'autoregressive'" if scorer.causal else "'monte_carlo' or 'left_to_right'"
        raise UserError(f"method {estimator.method!r} does not fit this model; choose {right}")
    for number, question in enumerate(questions):
        _check(number, question, mask_token_id, max_length, needs_prompt=scorer.right_shift)
    estimator = replace(estimator, right_shift=scorer.right_shift)
    first = np.cumsum([0, *(len(question.answers) for question in questions)])
    table_5A = torch.zeros(5, int(first[-1]), dtype=torch.float64)
    for number in range(scorer.data_rank, len(questions), scorer.data_size):
        question = questions[number]
        key = number if question.key is None else question.key
        for at, answer in enumerate(question.answers):
            copies = masked_answers(
                question.prompt,
                answer,
                estimator,
                mask_token_id=mask_token_id,
                question=key,
                block_size=scorer.block_size,
            )
            guidance = estimator.guidance if len(question.prompt) else 0.0  # nothing to do without
            is_prompt_L = np.arange(len(copies.clean_L)) < len(question.prompt)
            sum_D = _summed_cross_entropies(scorer, copies, guidance, is_prompt_L, mask_token_id)
            if sum_D is not None:
                passes = len(copies.tokens_DL) * (2 if guidance else 1)
                figures = [*copies.log_likelihood(sum_D), float(passes), *copies.halves(sum_D)]
                table_5A[:, first[number] + at] = torch.tensor(figures, dtype=torch.float64)
        on_question()
    columns = scorer.sum_over_ranks(table_5A).T.tolist()
    found = [
        AnswerLikelihood(value, stderr, int(passes), None if math.isnan(halves[0]) else tuple(halves))
        for value, stderr, passes, *halves in columns
    ]
    return [found[start:end] for start, end in pairwise(first.tolist())]


def windows(tokens: Sequence[int], length: int) -> list[Sequence[int]]:
    """A document in pieces of at most `length` tokens, one after the other."""
    return [tokens[start : start + length] for start in range(0, len(tokens), length)]


def document_log_likelihoods(
    scorer: GuidedScorer,
    documents: Sequence[Sequence[int]],
    estimator: ConditionalEstimator,
    *,
    mask_token_id: int,
    eos_token_id: int,
    max_length: int,
    keys: Sequence[int] | None = None,
    on_question: Callable[[], None] = lambda: None,
) -> list[AnswerLikelihood]:
    """Likelihood of each document without its end; every rank calls this and gets the same figures.

    A whole document has no prompt, so that nothing is guided. One that is longer than the context is cut into disjoint
    windows, each of which is scored on its own. Where nothing predicts a row's first token (`right_shift`) an `<eos>`
    goes before each window, as between documents.

    Args:
        scorer: the model.
        documents: token ids; none of an empty one.
        estimator: how; `monte_carlo` gives minus the NELBO of a window.
        mask_token_id: what masked positions become (the BOS of a causal model).
        eos_token_id: goes before a window where something must.
        max_length: the model's context.
        keys: on which each document's random draws hang; its place by default.
        on_question: called after each window of this rank's share.

    Raises:
        UserError: as for `conditional_log_likelihoods`.
    """
    prefix = [eos_token_id] if scorer.right_shift else []
    pieces = [windows(document, max_length - len(prefix)) for document in documents]
    # Windows draw apart from each other; what a document draws does not depend on the others.
    numbers = [number << 20 for number in range(len(pieces))] if keys is None else keys
    estimator = replace(estimator, guidance=0.0)
    questions = [
        Question(prefix, [piece], number + at)
        for number, parts in zip(numbers, pieces, strict=True)
        for at, piece in enumerate(parts)
    ]
    found = iter(
        conditional_log_likelihoods(
            scorer, questions, estimator, mask_token_id=mask_token_id, max_length=max_length, on_question=on_question
        )
    )
    return [_sum([next(found)[0] for _ in parts]) for parts in pieces]


def _sum(parts: Sequence[AnswerLikelihood]) -> AnswerLikelihood:
    """Of a document from its windows; nobody chooses between documents, so that halves are not needed."""
    return AnswerLikelihood(
        sum(part.log_likelihood for part in parts),
        sum(part.stderr**2 for part in parts) ** 0.5,
        sum(part.forward_passes for part in parts),
    )


def _check(number: int, question: Question, mask_token_id: int, max_length: int | None, *, needs_prompt: bool) -> None:
    if needs_prompt and not len(question.prompt):
        raise UserError(
            f"question {number}: the model's outputs predict the next token, so that nothing predicts the first one "
            "without a prompt; put an <eos> before it"
        )
    for at, answer in enumerate(question.answers):
        where = f"question {number}, answer {at}"
        if not len(answer):
            raise UserError(f"{where}: an answer without tokens has no likelihood")
        if mask_token_id in [*question.prompt, *answer]:
            raise UserError(f"{where}: the text contains the mask token ({mask_token_id})")
        if max_length is not None and len(question.prompt) + len(answer) > max_length:
            raise UserError(
                f"{where}: the prompt's {len(question.prompt)} tokens and the answer's {len(answer)} exceed the "
                f"model's {max_length} positions; shorten the prompt"
            )


def _summed_cross_entropies(
    scorer: GuidedScorer, copies: MaskedAnswers, guidance: float, is_prompt_L: BoolArray, mask_token_id: int
) -> FloatArray | None:
    """Of each copy; None on ranks that do not hold the last pipeline stage."""
    size = min(scorer.micro_batch_size, len(copies.tokens_DL))
    batches: list[CorruptedBatch] = list(copies.micro_batches(size))
    if guidance:
        without_prompt = [np.where(is_prompt_L, mask_token_id, batch.tokens_BL) for batch in batches]
        losses = scorer.guided_negative_log_likelihoods(batches, without_prompt, guidance)
    else:
        losses = scorer.negative_log_likelihoods(batches)
    if losses is None:
        return None
    parts = zip(losses, batches, range(0, len(copies.tokens_DL), size), strict=True)
    return np.concatenate([copies.sums(*part) for part in parts])[: len(copies.tokens_DL)]

"""A run that answers: likelihoods of given answers and generated texts, on any layout, kept as they come.

Every rank makes the same calls; who answers what is decided here. What is asked is known by its `name`, so that an
answer is found again in an `AnswerFile`; random draws hang on a request's `key`, whatever else is asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.conditional import ConditionalEstimator
from megatron_md.diffusion.sampler_config import SamplerConfig
from megatron_md.evaluate.answer_file import Answer, AnswerFile
from megatron_md.evaluate.conditional import (
    AnswerLikelihood,
    Question,
    conditional_log_likelihoods,
    document_log_likelihoods,
)
from megatron_md.evaluate.load import load_model
from megatron_md.evaluate.prompts import batches
from megatron_md.parallel import World, shared
from megatron_md.run.saved import SavedRun
from megatron_md.train.filling import fill
from megatron_md.train.inference import Inference

# Requests of a rank between two writings: few, so that little is lost, and more than one, so that ranks wait less for
# each other.
AT_ONCE = 4

Job = TypeVar("Job")
OnAnswer = Callable[[], None]


@dataclass(frozen=True)
class Likelihood:
    """Asks for log p(answer | prompt).

    Attributes:
        prompt: tokens that are given.
        answer: tokens to score.
        key: draws hang on it; the choices of a question share it.
        check_greedy: also decode greedily, the surest token first, and see whether that gives the answer.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    key: int
    check_greedy: bool = False


@dataclass(frozen=True)
class Document:
    """Asks for log p of a whole text; draws hang on the key."""

    tokens: Sequence[int]
    key: int


@dataclass(frozen=True)
class Continuation:
    """Asks for a text behind a prompt.

    Attributes:
        prompt: tokens that are given.
        config: how to fill the canvas.
        key: draws hang on it.
        until: texts before which the answer ends.
        eot_token_ids: tokens at which it ends, besides `<eos>`.
    """

    prompt: Sequence[int]
    config: SamplerConfig
    key: int
    until: Sequence[str] = ()
    eot_token_ids: tuple[int, ...] = ()


class Answerer:
    """A loaded run that answers requests.

    Attributes:
        forward_passes: rows that went through the model for the answers so far, on all ranks together and in earlier
            processes whose answers were found.
        answers: where answers are kept.
    """

    def __init__(self, saved: SavedRun, world: World, tokenizer: Tokenizer, answers: AnswerFile) -> None:
        self._saved, self._world, self._tokenizer = saved, world, tokenizer
        self.answers = answers
        self.forward_passes = 0

    @cached_property
    def model(self) -> Inference:
        """The run's weights, read when they are first needed."""
        return load_model(self._saved, self._world, self._tokenizer)

    def likelihoods(
        self, requests: Sequence[Likelihood], estimator: ConditionalEstimator, on_answer: OnAnswer = lambda: None
    ) -> list[Answer]:
        """Score answers.

        Raises:
            UserError: as for `conditional_log_likelihoods`.
        """

        def work(part: list[Likelihood]) -> list[Answer]:
            found = conditional_log_likelihoods(
                self.model,
                [Question(request.prompt, [request.answer], request.key) for request in part],
                estimator,
                mask_token_id=self._tokenizer.mask_token_id,
                max_length=self.model.max_length,
                on_question=on_answer,
            )
            single = [at for at, request in enumerate(part) if request.check_greedy]
            decoded = shared(self._world, [part[at] for at in single], lambda one: self._is_greedy(one, estimator))
            greedy = dict(zip(single, decoded, strict=True))
            return [_scored(likelihood, *greedy.get(at, (False, 0))) for at, (likelihood,) in enumerate(found)]

        return self._answered(requests, ("likelihood", repr(estimator)), work, on_answer)

    def documents(
        self, requests: Sequence[Document], estimator: ConditionalEstimator, on_answer: OnAnswer = lambda: None
    ) -> list[Answer]:
        """Score whole texts: minus the NELBO, exact for causal runs; long ones in disjoint windows.

        Raises:
            UserError: as for `document_log_likelihoods`.
        """

        def work(part: list[Document]) -> list[Answer]:
            found = document_log_likelihoods(
                self.model,
                [request.tokens for request in part],
                estimator,
                mask_token_id=self._tokenizer.mask_token_id,
                eos_token_id=self._tokenizer.eos_token_id,
                max_length=self.model.max_length,
                keys=[request.key for request in part],
                on_question=on_answer,
            )
            return [_scored(document) for document in found]

        return self._answered(requests, ("document", repr(estimator)), work, on_answer)

    def texts(self, requests: Sequence[Continuation], on_answer: OnAnswer = lambda: None) -> list[Answer]:
        """Fill a canvas behind each prompt; the text ends at what ends a text or before the first of `until`.

        Raises:
            UserError: as for `fill`.
        """
        size = self._saved.config.train.micro_batch_size

        def batch(part: list[Continuation]) -> list[Answer]:
            first = part[0]
            result = fill(
                self.model,
                [request.prompt for request in part],
                first.config,
                mask_token_id=self._tokenizer.mask_token_id,
                eos_token_id=self._tokenizer.eos_token_id,
                eot_token_ids=first.eot_token_ids,
                # A text does not depend on what it is batched with, so that it is the same when others are known.
                seeds=[hashed(f"{request.config.seed}/{request.key}") for request in part],
            )
            for _ in part:
                on_answer()
            rows = result.tokens_BL[:, -first.config.length :].tolist()
            return [
                Answer(text=self.text(row, request), forward_passes=result.forward_passes)
                for row, request in zip(rows, part, strict=True)
            ]

        def work(part: list[Continuation]) -> list[Answer]:
            in_blocks = self.model.block_size is not None  # takes prompts of different lengths together
            keys = [(0 if in_blocks else len(one.prompt), one.config, one.eot_token_ids) for one in part]
            groups = batches(keys, size)
            found = shared(self._world, [[part[at] for at in group] for group in groups], batch)
            by_place = {
                at: answer
                for group, answers in zip(groups, found, strict=True)
                for at, answer in zip(group, answers, strict=True)
            }
            return [by_place[at] for at in range(len(part))]

        return self._answered(requests, ("text",), work, on_answer, at_once=size)

    def text(self, tokens: Sequence[int], request: Continuation) -> str:
        """What a filled canvas says, without what ends it and what follows that."""
        ends = {self._tokenizer.eos_token_id, *request.eot_token_ids}
        stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        text = self._tokenizer.decode(tokens[:stop])
        for end in request.until:
            text = text.partition(end)[0] if end else text
        return text

    def _answered(
        self,
        requests: Sequence[Job],
        kind: tuple[str, ...],
        work: Callable[[list[Job]], list[Answer]],
        on_answer: OnAnswer,
        *,
        at_once: int = AT_ONCE,
    ) -> list[Answer]:
        """All answers: those that are known, and the others in parts, each of which is kept before the next begins."""
        names = [_name(kind, request) for request in requests]
        known = self.answers.known
        new = {name: request for name, request in zip(names, requests, strict=True) if name not in known}
        for _ in range(self._world.data_rank, len(names) - len(new), self._world.data_size):
            on_answer()
        todo = list(new.items())
        if todo:
            _ = self.model  # all ranks read the weights together, also those without a share
        size = at_once * self._world.data_size if self.answers.path is not None else max(1, len(todo))
        for start in range(0, len(todo), size):
            part = todo[start : start + size]
            answers = work([request for _, request in part])
            self.answers.add({name: answer for (name, _), answer in zip(part, answers, strict=True)})
        self.forward_passes += sum(known[name].forward_passes for name in set(names))
        return [known[name] for name in names]

    def _is_greedy(self, request: Likelihood, estimator: ConditionalEstimator) -> tuple[bool, int]:
        """Whether decoding one token after the other, the surest first, gives the answer; forward passes."""
        guidance = estimator.guidance if len(request.prompt) else 0.0
        result = fill(
            self.model,
            [request.prompt],
            SamplerConfig(length=len(request.answer), guidance=guidance),
            mask_token_id=self._tokenizer.mask_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
        )
        decoded = result.tokens_BL[0, -len(request.answer) :].tolist()
        return decoded == list(request.answer), result.forward_passes


def _scored(found: AnswerLikelihood, is_greedy: bool = False, further_passes: int = 0) -> Answer:
    return Answer(
        log_likelihood=found.log_likelihood,
        is_greedy=is_greedy,
        forward_passes=found.forward_passes + further_passes,
        halves=found.halves,
    )


def _name(kind: tuple[str, ...], request: Any) -> str:
    """What a request is known by: all that its answer depends on besides the run and the answers' settings."""
    return hashlib.blake2b(json.dumps([*kind, repr(request)]).encode(), digest_size=16).hexdigest()


def hashed(text: str) -> int:
    """A number of 42 bits: room for the windows of a text behind it, and a seed for any generator."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 22

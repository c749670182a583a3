"""The model behind lm-evaluation-harness: likelihoods by `conditional.py`, text by the samplers, on any layout.

Importing this module registers the model `megatron_md`; `python -m megatron_md.evaluate.harness` is the harness' own
command line with that model in it:

    python -m megatron_md.evaluate.harness run --model megatron_md --model_args run=runs/demo --tasks arc_easy

The harness believes that it runs on one process. Every rank holds all requests and makes the same calls; who scores
which question is decided below it.
"""

from __future__ import annotations

import atexit
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from megatron_md import parallel
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.names import strategies
from megatron_md.diffusion.sampler_config import SamplerConfig
from megatron_md.errors import UserError
from megatron_md.evaluate.conditional import (
    AnswerLikelihood,
    Question,
    conditional_log_likelihoods,
    document_log_likelihoods,
)
from megatron_md.evaluate.load import is_causal, load_model
from megatron_md.evaluate.tasks import HarnessSettings
from megatron_md.messages import progress
from megatron_md.parallel import World, shared
from megatron_md.run.saved import Placement, SavedRun, open_run
from megatron_md.train.inference import Inference, fill


@register_model("megatron_md")
class HarnessModel(TemplateLM):
    """A run of ours as the harness sees it.

    Attributes:
        settings: how requests are answered; may be replaced between evaluations.
        forward_passes: rows that went through the model so far, on all ranks together.
        shortened: requests so far whose prompt lost its beginning, because it did not fit.
    """

    def __init__(
        self,
        run: str | Path | SavedRun,
        *,
        batch_size: int | str = 8,
        device: str | None = "auto",
        tensor: int | None = None,
        pipeline: int = 1,
        trust: bool = False,
        max_batch_size: int | None = None,
        world: World | None = None,
        **settings: Any,
    ) -> None:
        """Open a run; weights are read when they are first needed.

        Args:
            run: run directory or checkpoint; or one that is open, and has its device, layout and trust.
            batch_size: rows per forward pass.
            device: `cpu`, or anything else for what is there.
            tensor: tensor-parallel size; all processes by default.
            pipeline: pipeline-parallel size.
            trust: load a checkpoint without a manifest, and import what its config says. Never by default.
            max_batch_size: the harness' own; not used.
            world: of a session that is under way; by default one is started, which ends with the process.
            settings: of `HarnessSettings`.

        Raises:
            UserError: bad input, with the way out.
        """
        super().__init__()
        # The harness says cuda:0 to all.
        placement = Placement(tensor, pipeline, "cpu" if device == "cpu" else "auto", trust)
        saved = run if isinstance(run, SavedRun) else open_run(run, placement)
        unknown = sorted(settings.keys() - HarnessSettings.__dataclass_fields__.keys())
        if unknown:
            known = ", ".join(HarnessSettings.__dataclass_fields__)
            raise UserError(f"model_args: unknown {', '.join(unknown)} (known: run, tensor, pipeline, trust, {known})")
        self.settings = HarnessSettings(**settings)
        train = replace(saved.config.train, micro_batch_size=int(batch_size))
        self.run: SavedRun = replace(saved, config=replace(saved.config, train=train))
        self.words = Tokenizer(saved.tokenizer)
        self.causal = is_causal(saved, mask_token_id=self.words.mask_token_id)
        self.settings.estimator(causal=self.causal)
        strategies.get(self.settings.strategy)
        self.max_length = saved.config.model.max_length
        if world is None:
            stack = ExitStack()
            world = stack.enter_context(parallel.session(self.run.config))
            atexit.register(stack.close)
        self.world = world
        self._device = world.device
        self.forward_passes = self.shortened = 0

    @cached_property
    def model(self) -> Inference:
        """The run's weights."""
        return load_model(self.run, self.world, self.words)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.words.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its caches on."""
        return self.words.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids, without special tokens."""
        ids: list[int] = self.words.encode(string).tolist()
        return ids

    def _loglikelihood_tokens(self, requests: Any, **unused: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("loglikelihood() is answered as a whole")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score log p(continuation | context), and tell whether greedy decoding gives the continuation.

        The choices of a question share their random draws. Greedy decoding is tried only where a question has a single
        continuation (LAMBADA's accuracy wants it); it is False elsewhere.

        Raises:
            UserError: a continuation is longer than the context.
        """
        pairs = [self._encode(*request.args) for request in requests]
        questions = [
            Question(prompt, [answer], _key(request)) for request, (prompt, answer) in zip(requests, pairs, strict=True)
        ]
        with self._progress("likelihoods", len(questions)) as advance:
            found = conditional_log_likelihoods(
                self.model,
                questions,
                self.settings.estimator(causal=self.causal),
                mask_token_id=self.words.mask_token_id,
                max_length=self.max_length,
                on_question=advance,
            )
        self._count([answer for (answer,) in found])
        continuations = defaultdict(set)
        for request in requests:
            continuations[_key(request)].add(request.args)
        single = [at for at, request in enumerate(requests) if len(continuations[_key(request)]) == 1]
        greedy = dict(zip(single, self._shared([pairs[at] for at in single], self._is_greedy), strict=True))
        self.forward_passes += sum(passes for _, passes in greedy.values())
        return [(answer.log_likelihood, greedy.get(at, (False, 0))[0]) for at, (answer,) in enumerate(found)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score log p of whole texts (minus the NELBO; exact for causal runs); long ones in disjoint windows."""
        documents = [self.tok_encode(request.args[0]) for request in requests]
        with self._progress("texts", len(documents)) as advance:
            found = document_log_likelihoods(
                self.model,
                documents,
                self.settings.estimator(causal=self.causal),
                mask_token_id=self.words.mask_token_id,
                eos_token_id=self.words.eos_token_id,
                max_length=self.max_length,
                keys=[_key(request) for request in requests],
                on_question=advance,
            )
        self._count(found)
        return [document.log_likelihood for document in found]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Fill a canvas behind each context; the text ends at an `<eos>` or before the first stop string.

        Raises:
            UserError: no canvas of the wanted kind fits behind a prompt.
        """
        batches: dict[tuple[int, SamplerConfig], list[int]] = defaultdict(list)
        prompts = []
        for at, request in enumerate(requests):
            context, arguments = request.args
            config = self.settings.sampler(arguments, self.max_length)
            prompts.append(self._shorten(self.tok_encode(context) or self._prefix, self.max_length - config.length))
            batches[len(prompts[-1]), config].append(at)
        size = self.run.config.train.micro_batch_size
        jobs = [
            (config, places[start : start + size])
            for (_, config), places in batches.items()
            for start in range(0, len(places), size)
        ]
        with self._progress("texts", len(requests)) as advance:

            def work(job: tuple[SamplerConfig, list[int]]) -> tuple[list[list[int]], int]:
                config, places = job
                # No two batches sample with the same noise.
                config = replace(config, seed=_hash(f"{config.seed}/{_key(requests[places[0]])}"))
                result = fill(
                    self.model,
                    [prompts[at] for at in places],
                    config,
                    mask_token_id=self.words.mask_token_id,
                    eos_token_id=self.words.eos_token_id,
                )
                for _ in places:
                    advance()
                return result.tokens_BL[:, -config.length :].tolist(), result.forward_passes * len(places)

            found = self._shared(jobs, work)
        self.forward_passes += sum(passes for _, passes in found)
        texts = [""] * len(requests)
        for (_, places), (answers, _) in zip(jobs, found, strict=True):
            for at, answer in zip(places, answers, strict=True):
                texts[at] = self._text(answer, requests[at].args[1].get("until") or [])
        return texts

    def _text(self, answer: list[int], until: str | Sequence[str]) -> str:
        eos = self.words.eos_token_id
        text = self.words.decode(answer[: answer.index(eos)] if eos in answer else answer)
        for stop in [until] if isinstance(until, str) else until:
            text = text.partition(stop)[0] if stop else text
        return text

    @property
    def _prefix(self) -> list[int]:
        """What stands for an empty prompt where a model's outputs predict the next token."""
        return [self.words.eos_token_id] if self.run.config.objective.right_shift else []

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Prompt and answer, the prompt cut from the left until both fit."""
        prompt, answer = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
        if not answer:  # the continuation's characters have merged with the context's last ones
            prompt, answer = self.tok_encode(context), self.tok_encode(continuation)
        return self._shorten(prompt or self._prefix, self.max_length - len(answer)), answer

    def _shorten(self, prompt: list[int], room: int) -> list[int]:
        if len(prompt) <= room or room < 1:
            return prompt if room > 0 else []
        self.shortened += 1
        return prompt[-room:]

    def _is_greedy(self, pair: tuple[list[int], list[int]]) -> tuple[bool, int]:
        """Whether decoding one token after the other, the surest first, gives the answer; forward passes."""
        prompt, answer = pair
        config = SamplerConfig(length=len(answer))
        result = fill(
            self.model,
            [prompt],
            config,
            mask_token_id=self.words.mask_token_id,
            eos_token_id=self.words.eos_token_id,
        )
        return result.tokens_BL[0, -len(answer) :].tolist() == list(answer), result.forward_passes

    def _shared(self, jobs: Sequence[Any], work: Callable[[Any], Any]) -> list[Any]:
        """What generating jobs give; a rank without a share reads the weights as well, which all ranks do together."""
        return shared(self.world, jobs, work) if jobs and self.model else []

    def _count(self, found: Sequence[AnswerLikelihood]) -> None:
        self.forward_passes += sum(answer.forward_passes for answer in found)

    def _progress(self, what: str, count: int) -> AbstractContextManager[Callable[..., None]]:
        """A bar on the main rank's terminal; its share stands for all."""
        total = math.ceil(count / self.world.data_size)
        return progress(f"{self.run.checkpoint} {what}", total, visible=self.world.is_main)


def _hash(text: str) -> int:
    """A number of 42 bits: room for the windows of a text behind it, and a seed for any generator."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 22


def _key(request: Instance) -> int:
    """What a request's random draws hang on: its task and document, whatever else is evaluated."""
    return _hash(f"{request.task_name}/{request.doc_id}") << 20


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

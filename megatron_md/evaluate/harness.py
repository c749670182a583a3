"""The model behind lm-evaluation-harness: likelihoods by `conditional.py`, text by the samplers, on any layout.

Importing this module registers the model `megatron_md`; `python -m megatron_md.evaluate.harness` is the harness' own
command line with that model in it:

    python -m megatron_md.evaluate.harness run --model megatron_md --model_args run=runs/demo --tasks arc_easy

The harness believes that it runs on one process. Every rank holds all requests and makes the same calls; who scores
which question is decided below it.
"""

from __future__ import annotations

import atexit
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from megatron_md import parallel
from megatron_md.data.chat_template import ChatTemplate
from megatron_md.data.entries import Message
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.names import strategies
from megatron_md.errors import UserError
from megatron_md.evaluate.answer_file import Answer, AnswerFile
from megatron_md.evaluate.answer_settings import HarnessSettings
from megatron_md.evaluate.answerer import Answerer, Continuation, Document, Likelihood, hashed
from megatron_md.evaluate.card import identity_of
from megatron_md.evaluate.dialogue import template_of
from megatron_md.evaluate.load import is_causal
from megatron_md.messages import progress
from megatron_md.parallel import World
from megatron_md.run.saved import Placement, SavedRun, open_run
from megatron_md.train.inference import Inference


@register_model("megatron_md")
class HarnessModel(TemplateLM):
    """A run of ours as the harness sees it.

    Attributes:
        settings: how requests are answered; its seed may be replaced between evaluations.
        answerer: what answers them.
        halves: of multiple-choice questions, by task, seed and document: the choices' log-likelihoods by the two halves
            of the draws, by the choice's number.
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
        state: str | Path | None = None,
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
            state: file that keeps the answers as they come, and from which a later evaluation takes them.
            settings: of `HarnessSettings`, under our names or those of LLaDA's evaluation.

        Raises:
            UserError: bad input, with the way out.
        """
        super().__init__()
        # The harness says cuda:0 to all.
        placement = Placement(tensor, pipeline, "cpu" if device == "cpu" else "auto", trust)
        saved = run if isinstance(run, SavedRun) else open_run(run, placement)
        self.settings = HarnessSettings.of(settings)
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
        identity = {**identity_of(self.run), **asdict(self.settings)}
        del identity["seed"]  # every answer has its own
        self.answerer = Answerer(
            self.run, world, self.words, AnswerFile(None if state is None else Path(state), identity)
        )
        self.halves: dict[str, dict[tuple[int, Any], dict[int, tuple[float, float]]]] = {}
        self._dialogues: dict[str, list[int]] = {}
        self.shortened = 0

    @property
    def model(self) -> Inference:
        """The run's weights."""
        return self.answerer.model

    @property
    def forward_passes(self) -> int:
        """Rows that went through the model for the answers so far, on all ranks together."""
        return self.answerer.forward_passes

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.words.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its caches on."""
        return self.words.sha256

    @cached_property
    def _template(self) -> ChatTemplate:
        return template_of(self.run, self.words, self.settings.template)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The Jinja of the chat template, for the harness' records.

        Raises:
            UserError: there is none, or `chat_template` names one of several that a tokenizer may have elsewhere.
        """
        if isinstance(chat_template, str):
            raise UserError(f"chat template {chat_template!r}: choose one by the model argument template instead")
        return self._template.source if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a dialogue. Its tokens are kept, since what a message spells is no special token.

        Args:
            chat_history: messages, each with `role` and `content`.
            add_generation_prompt: ask for an answer; else the last message is the beginning of one.
        """
        messages = [Message(message["role"], message["content"]) for message in chat_history]
        begun = "" if add_generation_prompt or messages[-1].role != "assistant" else messages.pop().content
        dialogue = self._template.encode(self.words, messages, add_generation_prompt=True)
        text = dialogue.text + begun
        self._dialogues[text] = [*dialogue.tokens.tolist(), *self.words.encode(begun).tolist()]
        return text

    @cached_property
    def _eot_token_ids(self) -> tuple[int, ...]:
        """What ends an answer besides `<eos>`: of the template that is asked for, or that rendered a prompt."""
        if self.settings.template is None and not self._dialogues:
            return ()
        return tuple(self._template.stop_ids(self.words))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids of a text without special tokens, or of a dialogue."""
        known = self._dialogues.get(string)
        return list(known) if known is not None else self.words.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: Any, **unused: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("loglikelihood() is answered as a whole")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score log p(continuation | context), and tell whether greedy decoding gives the continuation.

        The choices of a question share their random draws. Greedy decoding is tried only where a question has a single
        continuation (LAMBADA's accuracy wants it); it is False elsewhere.

        Raises:
            UserError: a continuation is longer than the context.
        """
        continuations = defaultdict(set)
        for request in requests:
            continuations[_key(request)].add(request.args)
        asked = []
        for request in requests:
            is_single = len(continuations[_key(request)]) == 1
            check_greedy = self.settings.is_check_greedy and is_single
            asked.append(Likelihood(*self._encode(*request.args), _key(request), check_greedy))
        with self._progress("likelihoods", len(asked)) as advance:
            answers = self.answerer.likelihoods(asked, self.settings.estimator(causal=self.causal), advance)
        for request, answer in zip(requests, answers, strict=True):
            self._keep_halves(request, answer)
        return [(_value(answer), answer.is_greedy) for answer in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score log p of whole texts (minus the NELBO; exact for causal runs); long ones in disjoint windows."""
        asked = [Document(self.tok_encode(request.args[0]), _key(request)) for request in requests]
        with self._progress("texts", len(asked)) as advance:
            answers = self.answerer.documents(asked, self.settings.estimator(causal=self.causal), advance)
        return [_value(answer) for answer in answers]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Fill a canvas behind each context; the text ends at what ends one or before the first stop string.

        Raises:
            UserError: no canvas of the wanted kind fits behind a prompt.
        """
        asked = []
        for request in requests:
            context, arguments = request.args
            config = self.settings.sampler(arguments, self.max_length)
            prompt = self._shorten(self.tok_encode(context) or self._prefix, self.max_length - config.length)
            until = arguments.get("until") or []
            stops = [until] if isinstance(until, str) else until
            asked.append(Continuation(prompt, config, _key(request), tuple(stops), self._eot_token_ids))
        with self._progress("texts", len(asked)) as advance:
            return [answer.text or "" for answer in self.answerer.texts(asked, advance)]

    @property
    def _prefix(self) -> list[int]:
        """What stands for an empty prompt where a model's outputs predict the next token."""
        return [self.words.eos_token_id] if self.run.config.objective.right_shift else []

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Prompt and answer, the prompt cut from the left until both fit."""
        if context in self._dialogues:
            prompt, answer = self.tok_encode(context), self.tok_encode(continuation)
        else:
            prompt, answer = (
                self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
            )
        if not answer:  # the continuation's characters have merged with the context's last ones
            prompt, answer = self.tok_encode(context), self.tok_encode(continuation)
        return self._shorten(prompt or self._prefix, self.max_length - len(answer)), answer

    def _shorten(self, prompt: list[int], room: int) -> list[int]:
        if len(prompt) <= room or room < 1:
            return prompt if room > 0 else []
        self.shortened += 1
        return prompt[-room:]

    def _keep_halves(self, request: Instance, answer: Answer) -> None:
        if answer.halves is None:
            return
        questions = self.halves.setdefault(str(request.task_name), {})
        choices = questions.setdefault((self.settings.seed, request.doc_id), {})
        # A question may ask for its choices again without the context.
        choices.setdefault(request.idx, answer.halves)

    def _progress(self, what: str, count: int) -> AbstractContextManager[Callable[..., None]]:
        """A bar on the main rank's terminal; its share stands for all."""
        total = math.ceil(count / self.world.data_size)
        return progress(f"{self.run.checkpoint} {what}", total, visible=self.world.is_main)


def _value(answer: Answer) -> float:
    assert answer.log_likelihood is not None, "a likelihood was asked for"
    return answer.log_likelihood


def _key(request: Instance) -> int:
    """What a request's random draws hang on: its task and document, whatever else is evaluated."""
    return hashed(f"{request.task_name}/{request.doc_id}") << 20


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

"""A chat with a run: lines are questions or commands; every rank has the conversation, the main one reads and shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_md import parallel
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.errors import UserError
from megatron_md.evaluate.canvas import LiveCanvas
from megatron_md.evaluate.chat_options import ChatOptions
from megatron_md.evaluate.dialogue import Conversation, Speech, template_of
from megatron_md.evaluate.load import is_causal, load_model
from megatron_md.evaluate.prompts import typed_lines
from megatron_md.evaluate.texts import TYPING_SECONDS, refuse_of_causal
from megatron_md.messages import tell
from megatron_md.parallel import World
from megatron_md.plugins import import_plugins
from megatron_md.run.saved import SavedRun
from megatron_md.train.filling import fill
from megatron_md.train.inference import Inference

HELP = "/reset forgets the conversation, /system TEXT begins a new one with another system text, /quit ends the chat"

OnText = Callable[[str], None]


def chat(saved: SavedRun, options: ChatOptions, on_answer: OnText) -> None:
    """Answer what is typed, until it ends; every rank calls this.

    Args:
        saved: the run, opened for this job.
        options: how.
        on_answer: given each answer on the main rank.

    Raises:
        UserError: bad options, with the way out. What is wrong with a line is told, and the next one is read.
    """
    if saved.trust:
        import_plugins(saved.config)  # they may register strategies
    tokenizer = Tokenizer(saved.tokenizer)
    speech = Speech(template_of(saved, tokenizer, options.template), tokenizer)
    if is_causal(saved, mask_token_id=tokenizer.mask_token_id):
        refuse_of_causal(saved, options.sampler)
    room = saved.config.model.max_length - options.length
    if room < 1:
        raise UserError(
            f"--length {options.length} leaves no room for a message in the model's {room + options.length}"
        )
    conversation = Conversation(speech, room, options.system)
    conversation.ask("?")  # what can be wrong with the system text is known before the model is loaded
    config = replace(saved.config, parallel=replace(saved.config.parallel, timeout_seconds=TYPING_SECONDS))
    with parallel.session(config) as world:
        partner = _Partner(load_model(saved, world, tokenizer), world, speech, conversation, options)
        for line in typed_lines(world):
            try:
                if not partner.hear(line, on_answer):
                    return
            except UserError as error:
                if world.is_main:
                    tell(error)


class _Partner:
    """A loaded run in a conversation."""

    def __init__(
        self, denoiser: Inference, world: World, speech: Speech, conversation: Conversation, options: ChatOptions
    ) -> None:
        self._denoiser, self._world, self._speech, self._options = denoiser, world, speech, options
        self._conversation = conversation
        self._sampler = options.config()
        self._answers = 0

    def hear(self, line: str, on_answer: OnText) -> bool:
        """Obey or answer a line; False where it ends the chat.

        Raises:
            UserError: nothing can be made of it.
        """
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self._conversation.reset()
        elif word == "/system":
            self._conversation.reset()
            self._conversation.system = rest.strip() or None
        elif line.startswith("/"):
            raise UserError(f"{word}: no such command; {HELP}; begin a message that starts with / by a blank")
        elif word:
            self._answer(line, on_answer)
        return True

    def _answer(self, question: str, on_answer: OnText) -> None:
        prompt, forgotten = self._conversation.ask(question)
        if forgotten and self._world.is_main:
            tell(f"[the oldest {forgotten} exchange(s) do not fit any more and are forgotten]")
        try:
            answer = self._written(prompt)
        except KeyboardInterrupt:
            if self._world.size > 1:
                raise  # the other ranks may be anywhere
            tell("[stopped: the question is forgotten]")
            return
        self._conversation.answered(question, answer)
        if self._world.is_main:
            on_answer(answer)

    def _written(self, prompt: list[int]) -> str:
        tokenizer = self._speech.tokenizer
        keys: dict[str, Any] = {
            "mask_token_id": tokenizer.mask_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "eot_token_ids": self._speech.eot_token_ids,
        }
        config = replace(self._sampler, seed=self._sampler.seed + self._answers)
        self._answers += 1
        if self._options.stream and self._world.is_main:
            canvas = LiveCanvas(self._decode, tokenizer.mask_token_id, start=len(prompt), transient=True)
            with canvas as live:
                result = fill(self._denoiser, [prompt], config, on_step=live.on_step, **keys)
        else:
            result = fill(self._denoiser, [prompt], config, **keys)
        return self._speech.answer(result.tokens_BL[0, -config.length :].tolist())[0]

    def _decode(self, tokens: list[int]) -> str:
        return self._speech.tokenizer.decode(tokens, show_special=True)

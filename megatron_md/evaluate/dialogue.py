"""Dialogues with a run: which template it speaks by, what of a conversation fits, and where an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_md.data.chat_template import ChatTemplate
from megatron_md.data.entries import Message
from megatron_md.data.shards import load_manifest
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.errors import UserError
from megatron_md.run.saved import SavedRun


def template_of(saved: SavedRun, tokenizer: Tokenizer, template: str | None) -> ChatTemplate:
    """The template that a run is spoken to by.

    The one that is asked for; else that of the chat corpus that the run was trained on, if it is still there; else the
    tokenizer's own.

    Raises:
        UserError: there is none, or it fails.
    """
    corpus = saved.config.data.train
    if template is None and isinstance(corpus, str) and Path(corpus).exists():
        manifest = load_manifest(corpus, check_files=False)
        if manifest.kind == "chat":
            return ChatTemplate.recorded(manifest.source["chat"]["template"])
    return ChatTemplate.of(tokenizer, template)


@dataclass(frozen=True)
class Speech:
    """How a run is spoken to, and how its answers end.

    Attributes:
        template: of the dialogue.
        tokenizer: of the run.
    """

    template: ChatTemplate
    tokenizer: Tokenizer

    @property
    def eot_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, `<eos>` among them."""
        return tuple(self.template.stop_ids(self.tokenizer))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a dialogue that asks for an answer.

        Raises:
            UserError: the template refuses it.
        """
        tokens: list[int] = self.template.encode(self.tokenizer, messages, add_generation_prompt=True).tokens.tolist()
        return tokens

    def answer(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """The answer in a filled canvas, without what ends it and what follows that: its text, its tokens."""
        ends = set(self.eot_token_ids)
        kept = list(tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))])
        text = self.tokenizer.decode(kept)
        for end in self.template.stop_texts:  # where the tokenizer spells it in several tokens
            text = text.partition(end)[0]
        return text, kept


class Conversation:
    """What was said so far, of which the oldest turns are forgotten where there is no room for them.

    Attributes:
        system: what comes before all turns, None for nothing.
        turns: questions and answers, one after the other, the oldest first.
    """

    def __init__(self, speech: Speech, room: int, system: str | None = None) -> None:
        """Begin a conversation.

        Args:
            speech: how it is written.
            room: most tokens that a prompt may have.
            system: what comes before all turns.
        """
        self._speech, self._room = speech, room
        self.system = system
        self.turns: list[Message] = []

    def ask(self, question: str) -> tuple[list[int], int]:
        """The prompt for an answer to a question, and how many of the oldest exchanges had to be forgotten for it.

        The question is part of the conversation only when its answer is `answered`.

        Raises:
            UserError: the question alone does not fit, or the template refuses it.
        """
        before = [Message("system", self.system)] if self.system else []
        turns = list(self.turns)
        while True:
            prompt = self._speech.prompt([*before, *turns, Message("user", question)])
            if len(prompt) <= self._room:
                break
            if not turns:
                raise UserError(
                    f"the message's {len(prompt)} tokens exceed the {self._room} that are left beside the answer; "
                    "shorten it, the system text or --length"
                )
            turns = turns[2:]
        forgotten = (len(self.turns) - len(turns)) // 2
        self.turns = turns
        return prompt, forgotten

    def answered(self, question: str, answer: str) -> None:
        """Add a question and its answer."""
        self.turns += [Message("user", question), Message("assistant", answer)]

    def reset(self) -> None:
        """Forget all turns."""
        self.turns = []

"""Dialogues: from the records of a chat data set to messages in order, and from those to tokens with marked answers.

Three formats are known: `messages` (role, content), `prompt` with `completion` (texts, or lists of messages), and
ShareGPT's `conversations` (from, value). A record that cannot be used becomes a `Rejection` with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from megatron_md.data.answers import runs_of
from megatron_md.data.chat_template import ChatTemplate, EncodedDialogue, TemplateError
from megatron_md.data.entries import Dialogue, Document, Entry, Message, Record, Rejection
from megatron_md.data.readers import DIALOGUE_KEYS
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.data.writer import Tokenised
from megatron_md.errors import UserError

Turns = Literal["all", "split"]
Truncate = Literal["reject", "left", "right"]

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "ipython": "tool", "observation": "tool",
}  # fmt: skip
# Who may speak after whom; the empty name is the beginning.
AFTER = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class _UnfitError(Exception):
    """A record that is no dialogue to learn from: why, and what more there is to say."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ChatSettings:
    """How dialogues become documents.

    Attributes:
        template: how they are written.
        turns: `split` makes one document of each of the assistant's turns, with everything before it as its prompt;
            `all` one of a dialogue, in which all these turns are answers. Attention sees both ways, so that under
            `all` an answer is learnt with what comes after it in sight.
        max_tokens: longest document; None: any.
        truncate: what becomes of longer ones. `reject` leaves them out; `left` drops the earliest turns, but not the
            system message, until the rest fits; `right` cuts off what is beyond, be it the end of an answer.
    """

    template: ChatTemplate
    turns: Turns = "split"
    max_tokens: int | None = None
    truncate: Truncate = "reject"

    def record(self) -> dict[str, Any]:
        """As JSON values, for a manifest."""
        return {**vars(self), "template": self.template.record()}


def dialogues(entries: Iterable[Entry], turns: Turns) -> Iterator[Entry]:
    """The dialogues of records, in order, under `split` as many as a dialogue has answers; other entries as they are.

    Raises:
        UserError: the first record has a format that is not known.
    """
    is_known = False
    for entry in entries:
        if not isinstance(entry, Record):
            yield entry
            continue
        is_known = is_known or has_dialogue(entry.fields)
        if not is_known:
            raise UserError(f"{entry.name}: not a dialogue: {_keys_seen(entry.fields)}")
        try:
            dialogue = dialogue_of(entry)
        except _UnfitError as unfit:
            yield Rejection(entry.name, unfit.reason, unfit.detail)
            continue
        if turns == "all":
            yield dialogue
            continue
        for index, message in enumerate(dialogue.messages):
            if message.role == "assistant" and index >= dialogue.first_answer:
                yield Dialogue(f"{dialogue.name}@{index}", dialogue.messages[: index + 1], first_answer=index)


def has_dialogue(fields: Iterable[str]) -> bool:
    """Whether a record with these fields is one of a known format."""
    return any(set(keys) <= set(fields) for keys in DIALOGUE_KEYS)


def _keys_seen(fields: dict[str, Any]) -> str:
    wanted = "; ".join(" and ".join(keys) for keys in DIALOGUE_KEYS)
    return f"its keys are {', '.join(map(str, fields)) or 'none'}, known are {wanted}"[:400]


def dialogue_of(record: Record) -> Dialogue:
    """The dialogue in a record, checked; turns that nobody answers are left out of its end.

    Raises:
        _UnfitError: there is none that could be learnt from.
    """
    fields, first_answer = record.fields, 0
    if not has_dialogue(fields):
        raise _UnfitError("unknown format", _keys_seen(fields))
    if fields.get("messages") is not None:
        messages = _messages(fields["messages"], "role", "content")
    elif fields.get("completion") is not None and "prompt" in fields:
        prompt = _prompt_part(fields["prompt"], "user")
        messages, first_answer = [*prompt, *_prompt_part(fields["completion"], "assistant")], len(prompt)
    else:
        messages = _messages(fields.get("conversations"), "from", "value")
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=-1)
    if last < first_answer:
        raise _UnfitError("no assistant turn")
    messages = messages[: last + 1]
    for before, message in zip(["", *(message.role for message in messages)], messages, strict=False):
        if message.role not in AFTER[before]:
            raise _UnfitError("roles out of order", f"{message.role} after {before or 'nothing'}")
        if message.role == "assistant" and not message.content.strip():
            raise _UnfitError("empty answer")
    return Dialogue(record.name, tuple(messages), first_answer)


def _prompt_part(value: Any, role: str) -> list[Message]:
    """A prompt or a completion: a text of this role's, or messages."""
    return [Message(role, _text(value))] if isinstance(value, str) else _messages(value, "role", "content")


def _messages(turns: Any, role_key: str, text_key: str) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _UnfitError("malformed dialogue", "its turns are no list of objects")
    messages = []
    for turn in turns:
        name, text = turn.get(role_key), turn.get(text_key)
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise _UnfitError("unknown role", repr(name)[:80])
        if turn.get("tool_calls"):
            raise _UnfitError("tool calls", "only text can be learnt: write the calls into the content")
        if text_key not in turn:
            raise _UnfitError("malformed dialogue", f"a turn without {text_key}")
        messages.append(Message(role, _text(text)))
    return messages


def _text(content: Any) -> str:
    """The text of a message: a text, or a list of parts that are text."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if content is None:
        return ""
    if not isinstance(content, str):
        raise _UnfitError("malformed dialogue", "the content of a turn is no text")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise _UnfitError("not encodable as UTF-8") from None
    return content


def tokenise_dialogue(
    tokenizer: Tokenizer, settings: ChatSettings, dialogue: Dialogue, checksum: int, *, check: bool
) -> Tokenised | Rejection:
    """The tokens of a dialogue with its answers, or why it is left out.

    Args:
        tokenizer: the tokenizer.
        settings: how dialogues become documents.
        dialogue: the dialogue.
        checksum: its fingerprint, which goes on.
        check: check that its texts survive the tokenizer.

    Raises:
        UserError: they do not, or the template does not say where its answers are.
    """
    if check:
        for number, message in enumerate(dialogue.messages):
            tokenizer.check_round_trip(Document(f"{dialogue.name}, turn {number}", message.content))
    try:
        document = _fitting(tokenizer, settings, dialogue)
    except TemplateError as error:
        return Rejection(dialogue.name, "template fails", str(error), checksum)
    limit, size = settings.max_tokens, len(document.tokens)
    if limit is not None and limit < size and settings.truncate != "right":
        return Rejection(dialogue.name, "longer than max-tokens", f"{size} tokens", checksum)
    runs = runs_of(document.is_answer[:limit])
    if not len(runs):
        return Rejection(dialogue.name, "all prompt", f"of {size} tokens", checksum)
    # Under `right` the cut may fall into a later prompt, which nothing answers then.
    tokens = document.tokens[: runs[-1, 1]].astype(np.uint32)
    return Tokenised(tokens, len(document.text.encode()), checksum, runs)


def _fitting(tokenizer: Tokenizer, settings: ChatSettings, dialogue: Dialogue) -> EncodedDialogue:
    """A dialogue up to the end of its last answer, under `left` less as many of its first turns as it takes.

    What a template writes behind the last answer is left out: `<eos>` comes there, in rows and in generated texts.
    """
    while True:
        encoded = settings.template.encode(tokenizer, dialogue.messages, first_answer=dialogue.first_answer)
        if encoded.is_answer.any():
            end = int(np.flatnonzero(encoded.is_answer)[-1]) + 1
            encoded = replace(encoded, tokens=encoded.tokens[:end], is_answer=encoded.is_answer[:end])
        shorter = _without_first_question(dialogue) if settings.truncate == "left" else None
        if settings.max_tokens is None or len(encoded.tokens) <= settings.max_tokens or shorter is None:
            return encoded
        dialogue = shorter


def _without_first_question(dialogue: Dialogue) -> Dialogue | None:
    """A dialogue without its first question and what answers it; None where it has no other one."""
    questions = [index for index, message in enumerate(dialogue.messages) if message.role == "user"]
    if len(questions) < 2:
        return None
    first, second = questions[:2]
    messages = dialogue.messages[:first] + dialogue.messages[second:]
    return replace(dialogue, messages=messages, first_answer=max(0, dialogue.first_answer - (second - first)))

"""Chat templates: how a dialogue becomes the text that a model sees, which of its tokens are answers, what ends one.

A template is Jinja: a built-in one, a file, or the tokenizer's own. It is rendered by `transformers`, in its sandbox.
Where it has `{% generation %}` tags they enclose the answers; of others, an answer is what an assistant's turn adds to
the text that asks for it. An answer includes what ends the turn (`<|eot_id|>`, `<|im_end|>`), which a model must learn
to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_md.batch import BoolArray, Int64Array
from megatron_md.data.chat_builtin import BUILT_IN
from megatron_md.data.entries import Message
from megatron_md.data.optional import optional_package
from megatron_md.data.shard_index import STRICT
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.errors import UserError
from megatron_md.json_file import as_record, read_regular

TAGS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARKER = re.compile(r"<\|\w+\|>")
OWN = "tokenizer's own"
PROBE = (Message("user", "question"), Message("assistant", "answer"))
# Which of Unicode's noncharacters stand in no text that is meant for exchange.
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

Span = tuple[int, int]


class TemplateError(UserError):
    """A template refuses a dialogue, or fails on it."""


@dataclass(frozen=True, eq=False)
class EncodedDialogue:
    """A dialogue as a model sees it.

    Attributes:
        tokens: its tokens [n]; an `<eos>` only where the template writes one.
        is_answer: [n], which of them belong to an answer, what ends its turn included.
        text: what the template wrote.
    """

    tokens: Int64Array
    is_answer: BoolArray
    text: str


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        name: of a built-in one, or of the file that it comes from, wherever it lies: manifests hold it.
        source: its Jinja.
        variables: what it may refer to besides the messages, such as `bos_token`.
        stop_texts: what ends an assistant's turn, besides the tokenizer's `<eos>`.
    """

    __pydantic_config__ = STRICT

    name: str
    source: str
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, template: str | None) -> ChatTemplate:
        """Find a template.

        Args:
            tokenizer: its special tokens are the template's variables.
            template: name of a built-in one, path of a Jinja file, or None for the tokenizer's own
                (`chat_template.jinja`, or `chat_template` in `tokenizer_config.json`, beside its file).

        Raises:
            UserError: there is no such template, or it fails on a question and an answer.
        """
        variables = dict(tokenizer.token_names) if tokenizer is not None else {"eos_token": "<eos>"}
        builtin = BUILT_IN.get(template or "")
        if builtin is not None:
            is_known = tokenizer is None or builtin.bos_token in tokenizer.special_names.values()
            variables.setdefault("bos_token", builtin.bos_token if is_known else "")
            found = cls(str(template), builtin.source, variables)
        elif template is not None:
            path = Path(template)
            if not path.suffix and not path.exists():
                raise UserError(f"no template {template!r}: give a .jinja file or one of {', '.join(BUILT_IN)}")
            found = cls(path.name, _decoded(path), variables)
        else:
            place = tokenizer.path.parent if tokenizer is not None else "no tokenizer"
            if tokenizer is None or tokenizer.chat_template is None:
                raise UserError(f"{place}: holds no chat template; choose one by --template: {', '.join(BUILT_IN)}")
            found = cls(OWN, tokenizer.chat_template, variables)
        found.render(PROBE)
        return found

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> ChatTemplate:
        """The template that a chat corpus was made with, from `source["chat"]["template"]` of its manifest.

        Raises:
            UserError: it is none.
        """
        return as_record(cls, dict(record), "the manifest's chat template", "build the corpus again")

    def record(self) -> dict[str, Any]:
        """What `recorded` takes, as JSON values."""
        return asdict(self)

    @cached_property
    def stop_texts(self) -> tuple[str, ...]:
        """What ends an assistant's turn: what is written after its content, less blanks."""
        end = self.render(PROBE).rpartition(PROBE[-1].content)[2].strip()
        return (end,) if end else ()

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Tokens that each end an assistant's turn, ascending: the tokenizer's `<eos>`, and the template's own.

        An end that this tokenizer spells in several tokens is none of them.
        """
        ids = {tokenizer.eos_token_id}
        for text in self.stop_texts:
            first, *rest = tokenizer.encode(text, special=True).tolist()
            if not rest or first in tokenizer.special_names:
                ids.add(first)
        return sorted(ids)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a dialogue.

        Args:
            messages: its turns, at least one.
            add_generation_prompt: end with what an assistant's turn begins with.

        Raises:
            TemplateError: the template refuses these messages, or fails on them.
            UserError: `transformers` is not installed.
        """
        return self._render(messages, add_generation_prompt)[0]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[str, list[Span]]:
        """The text, and where its `{% generation %}` tags enclose what: none where the template has no tags."""
        renderer = optional_package("transformers.utils.chat_template_utils", f"chat template {self.name}")
        try:
            texts, spans = renderer.render_jinja_template(
                [[asdict(message) for message in messages]],
                chat_template=self.source,
                return_assistant_tokens_mask=self.has_tags,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise TemplateError(f"chat template {self.name}: {' '.join(str(error).split())[:200]}") from error
        return texts[0], spans[0] if self.has_tags else []

    @cached_property
    def has_tags(self) -> bool:
        """Whether it marks what an assistant says."""
        return TAGS.search(self.source) is not None

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        first_answer: int = 0,
    ) -> EncodedDialogue:
        """The tokens of a dialogue, as `transformers.apply_chat_template` gives them but for two things.

        What a message's text spells is text, though it spell a special token: nobody ends a turn or begins one from
        within. And an answer's tokens are its own, as the model starts from a prompt that was tokenised without it.

        Args:
            tokenizer: the tokenizer.
            messages: the turns, at least one.
            add_generation_prompt: end with what an assistant's turn begins with.
            first_answer: the assistant's turns before this message are no answers.

        Raises:
            TemplateError: the template refuses these messages, or fails on them.
            UserError: the template does not say where its answers are, or writes the mask token.
        """
        messages, fence = self._fenced(tokenizer, messages)
        text, spans = self._render(messages, add_generation_prompt)
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if not self.has_tags:
            found = self._spans_by_prefixes(text, messages, first_answer)
        elif len(spans) == len(answers):
            found = dict(zip(answers, spans, strict=True))
        elif first_answer:
            raise UserError(
                f"chat template {self.name}: {len(spans)} {{% generation %}} blocks for {len(answers)} turns of the "
                "assistant: which of them is the last one cannot be known; use --turns all"
            )
        else:
            found = dict(enumerate(spans))
        tokens, is_answer = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.bool_)]
        # Prompts and answers apart, also in the turns before: what a model continues never depends on what follows.
        kinds = {span: index >= first_answer for index, span in found.items()}
        cuts = sorted({0, len(text), *(edge for span in kinds for edge in span)})
        for start, stop in pairwise(cuts):
            for piece in text[start:stop].split(fence):
                tokens.append(tokenizer.encode(piece, special=True))
                is_answer.append(np.full(len(tokens[-1]), kinds.get((start, stop), False)))
        encoded = EncodedDialogue(np.concatenate(tokens), np.concatenate(is_answer), text.replace(fence, ""))
        if (encoded.tokens == tokenizer.mask_token_id).any():
            raise UserError(f"chat template {self.name}: writes the mask token, which no text may hold")
        return encoded

    def _fenced(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """The messages with a noncharacter inside everything that spells a special token; and that noncharacter."""
        special_text = _special_text(tokenizer, self.source)
        contents = "".join(message.content for message in messages)
        fence = next((sign for sign in NONCHARACTERS if sign not in contents), None)
        if fence is None:
            raise TemplateError("a dialogue holds all noncharacters of Unicode")
        return [
            Message(message.role, special_text.sub(rf"\g<0>{fence}", message.content)) for message in messages
        ], fence

    def _spans_by_prefixes(self, text: str, messages: Sequence[Message], first_answer: int) -> dict[int, Span]:
        """Where each assistant's turn stands, by its message: what it adds to the text that asks for it."""
        found = {}
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True)
            turn = self.render(messages[: index + 1])
            if any(turn.rstrip().endswith(end) for end in self.stop_texts):
                turn = turn.rstrip()
            if turn.startswith(prompt) and text.startswith(turn):
                found[index] = (len(prompt), len(turn))
            elif index >= first_answer:
                raise UserError(
                    f"chat template {self.name}: what it writes before an answer is not what it writes to ask for one, "
                    "or changes with later turns, so that answers cannot be found: enclose them in {% generation %} "
                    "and {% endgeneration %}, or choose a built-in template"
                )
        return found


@lru_cache(maxsize=8)
def _special_text(tokenizer: Tokenizer, source: str) -> re.Pattern[str]:
    """Finds the first character of whatever spells a special token, or one that a template writes as such."""
    markers = (marker for marker in MARKER.findall(source) if len(tokenizer.encode(marker, special=True)) == 1)
    names = sorted({*tokenizer.special_names.values(), *markers})
    # A lookahead, since names may overlap.
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, names))})).", re.DOTALL)


def _decoded(path: Path) -> str:
    try:
        return read_regular(path, "give a Jinja template").decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; give a Jinja template") from None

"""What a corpus consists of: documents of text or of tokens, dialogues, and what had to be left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_md.errors import UserError


@dataclass(frozen=True)
class Document:
    """One document: its name, unique within the corpus, and its text."""

    name: str
    text: str


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """One document that was tokenised elsewhere: its name and its tokens [n]."""

    name: str
    tokens: npt.NDArray[np.integer]


@dataclass(frozen=True)
class Record:
    """One record of which more is read than a text: its name, and its fields by name."""

    name: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue: who speaks (`system`, `user`, `assistant`, `tool`), and what."""

    role: str
    content: str


@dataclass(frozen=True)
class Dialogue:
    """One dialogue: its name, unique within the corpus, and its turns.

    Attributes:
        first_answer: the assistant's turns from this message on are what a model is to learn; earlier ones are prompt.
    """

    name: str
    messages: tuple[Message, ...]
    first_answer: int = 0


@dataclass(frozen=True)
class Rejection:
    """A document that is left out, and why.

    Attributes:
        name: the document, or the file where a whole file cannot be read.
        reason: one of a few short texts, by which rejections are counted.
        detail: what more there is to say.
        fingerprint: checksum of what was read, by which an interrupted build finds its place again.
    """

    name: str
    reason: str
    detail: str = ""
    fingerprint: int = field(default=0, compare=False, repr=False)


Entry = Document | TokenDocument | Record | Dialogue | Rejection


class InputError(UserError):
    """A file of the input is damaged or unfit as a whole: how many documents it holds cannot be known.

    Attributes:
        reason: short text by which it is counted where such files are skipped.
    """

    def __init__(self, message: str, reason: str = "damaged file") -> None:
        super().__init__(message)
        self.reason = reason

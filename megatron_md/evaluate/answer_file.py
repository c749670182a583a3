"""Answers on disk as they come, one a line, so that an evaluation that was killed goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_md.errors import UserError
from megatron_md.files import append, replace_file
from megatron_md.json_file import LARGE, as_record, parse_json, read_regular
from megatron_md.together import on_main, place
from megatron_md.train.callbacks.metrics import without_nan

FORMAT = 1
WAY_OUT = "remove it to start anew, or name another file"


@dataclass(frozen=True)
class Answer:
    """What was answered to a request.

    Attributes:
        log_likelihood: of the answer that was asked about, in nats; None of a generated text.
        is_greedy: whether greedy decoding gives it.
        text: what was generated; None of a likelihood.
        forward_passes: rows that went through the model.
        halves: the same log-likelihood by the first and by the second half of the draws, where there are two.
    """

    log_likelihood: float | None = None
    is_greedy: bool = False
    text: str | None = None
    forward_passes: int = 0
    halves: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Line:
    request: str
    answer: Answer


class AnswerFile:
    """A file of answers, or none at all; every rank makes the same calls, the main one writes.

    The first line says whose answers they are; each further one is an answer under the name of its request. A line is
    written whole, so that what a killed process leaves is whole lines and at most a part of one, which is cut off.

    Attributes:
        path: the file; None keeps answers in memory.
        known: answers by the names of their requests.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        """Open or begin a file.

        Args:
            path: the file.
            identity: what its answers depend on besides their requests, as JSON values.

        Raises:
            UserError: it is no such file, is damaged, or holds answers of something else; the message says what.
        """
        self.path = path
        self.known: dict[str, Answer] = {}
        if path is not None:
            self.known = on_main(lambda: _opened(path, dict(identity)))

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers, and write them before this returns."""
        self.known.update(answers)
        if self.path is not None and place()[0] == 0:
            lines = (json.dumps(without_nan(asdict(_Line(*item)))) + "\n" for item in answers.items())
            append(self.path, "".join(lines))


def _opened(path: Path, identity: dict[str, Any]) -> dict[str, Answer]:
    head = {"answers": FORMAT, **identity}
    data = read_regular(path, WAY_OUT, most_bytes=LARGE) if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        # Nothing, or what was cut off within the first line.
        if data and not json.dumps(head).encode().startswith(data):
            raise UserError(f"{path}: holds no answers; {WAY_OUT}")
        replace_file(path, json.dumps(head) + "\n")
        return {}
    first, *lines = whole.decode("utf-8", errors="replace").splitlines()
    _check_head(path, parse_json(first, f"{path} line 1", WAY_OUT), head)
    found = {}
    for number, line in enumerate(lines, start=2):
        where = f"{path} line {number}"
        record = as_record(_Line, parse_json(line, where, WAY_OUT), where, WAY_OUT)
        # JSON has no infinity: what can never be said.
        is_never = record.answer.log_likelihood is None and record.answer.text is None
        found[record.request] = replace(record.answer, log_likelihood=-math.inf) if is_never else record.answer
    if len(whole) < len(data):
        replace_file(path, whole)
    return found


def _check_head(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    if not isinstance(found, dict) or found.get("answers") != FORMAT:
        raise UserError(f"{path}: holds no answers; {WAY_OUT}")
    for key in [*wanted, *found]:
        if found.get(key) != wanted.get(key):
            raise UserError(
                f"{path}: holds answers of {key.replace('_', ' ')} {found.get(key)!r}, not {wanted.get(key)!r}; "
                f"{WAY_OUT}"
            )

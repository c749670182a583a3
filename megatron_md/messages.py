"""What leaves a run for people to read: no text commands a terminal, and no URL shows its secrets.

Whatever a foreign file, a server or a model may have written passes here on its way to a terminal, a log or a record.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

HIDDEN = "***"
LINE_SECONDS = 10.0

# Control characters (C0, DEL, C1), breaks of line and paragraph, marks that turn the writing direction, surrogates.
_COMMANDS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_COMMANDS_IN_LINES = re.compile(_COMMANDS.pattern.replace(r"\x00-\x1f", r"\x00-\x08\x0b-\x1f"))

# One slash: what pathlib makes of a URL. The bound keeps the search linear.
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{1,30}://|(?:https?|ftp|s3|gs|hf):/", re.IGNORECASE)
_AUTHORITY = re.compile(rf"({_SCHEME.pattern})([^/?#]*)", re.IGNORECASE)
_WORD = re.compile(r"[^\s\"<>`]+")
_QUERY = re.compile(r"[?#]")
_AROUND = ":;,.)]}'\\"  # may follow a URL in a sentence, or in JSON
_SECRET_KEY = re.compile(
    r"(?:^|[_.-])(?:password|passwd|secret|credentials?|authorization"
    r"|(?:api|access|secret|private|wandb)_?key|(?:api|access|auth|bearer|hf)_?token)$",
    re.IGNORECASE,
)


def printable(text: str, *, multiline: bool = False) -> str:
    r"""A text that no terminal obeys: what could command it is shown as an escape, such as `\x1b`.

    Args:
        text: any text.
        multiline: leave newlines and tabs as they are.
    """
    commands = _COMMANDS_IN_LINES if multiline else _COMMANDS
    return commands.sub(lambda found: ascii(found[0])[1:-1], text)


def redacted(value: Any) -> Any:
    """The same text, or nested lists and mappings of texts, without user, password, query and fragment of any URL.

    `https://user:word@host/x?key=1` becomes `https://***@host/x?***`. In mappings, a text whose key calls it a secret
    (`api_key`, `password`, ...) goes as well.
    """
    if isinstance(value, str):
        return _WORD.sub(_redacted_word, value)
    if isinstance(value, dict):
        return {redacted(key): _of_key(key, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(redacted, value))
    return value


def _of_key(key: Any, value: Any) -> Any:
    is_secret = isinstance(key, str) and isinstance(value, str) and value and _SECRET_KEY.search(key)
    return HIDDEN if is_secret else redacted(value)


def _redacted_word(match: re.Match[str]) -> str:
    word = match[0]
    start = _SCHEME.search(word)
    if start is None:
        return word
    query = _QUERY.search(word, start.end())
    if query is not None and (secret := word[query.end() :].rstrip(_AROUND)):
        word = word[: query.end()] + HIDDEN + word[query.end() + len(secret) :]
    return _AUTHORITY.sub(_redacted_authority, word)


def _redacted_authority(match: re.Match[str]) -> str:
    scheme, authority = match.groups()
    user, at, host = authority.rpartition("@")
    if at:
        return f"{scheme}{HIDDEN}@{host}" if user else match[0]
    bare = authority.rstrip(_AROUND)
    port = bare.partition(":")[2]
    # `user:wo...`: cut off before its @.
    is_cut = port and not port.isdigit() and not authority.startswith("[")
    return f"{scheme}{HIDDEN}{authority[len(bare) :]}" if is_cut else match[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the known word most like `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(text: object, *, multiline: bool = False) -> str:
    """A message as it may be shown: redacted and printable."""
    return printable(redacted(str(text)), multiline=multiline)


def tell(text: object, *, multiline: bool = False) -> None:
    """Print a message on stderr, as `shown`; newlines are escaped too unless it is meant to have several lines."""
    _write(sys.stderr, text, multiline)


def tell_error(error: Exception, speaker: str = "megatron-md") -> None:
    """Print what an error says on stderr, behind who says it; one that has several `lines` needs as many."""
    lines = getattr(error, "lines", None) or [str(error)]
    tell("\n".join(shown(f"{speaker}: {line}") for line in lines), multiline=True)


def say(text: object, *, multiline: bool = False) -> None:
    """Print an answer on stdout, as `shown`; newlines are escaped too unless it is meant to have several lines."""
    _write(sys.stdout, text, multiline)


def _write(file: TextIO, text: object, multiline: bool) -> None:
    # In one write, so that lines of other processes cannot come in between.
    file.write(shown(text, multiline=multiline) + "\n")
    file.flush()


@contextmanager
def progress(
    text: str, total: int | None = None, *, visible: bool = True, transient: bool = False, lines: bool = False
) -> Iterator[Callable[..., None]]:
    """A bar on stderr where that is a terminal; nothing elsewhere, or a line now and then.

    Args:
        text: what it is the progress of, told as `shown`.
        total: number of steps; None where nobody knows, or does yet.
        visible: False for none, as on all ranks but one.
        transient: leave nothing of it behind.
        lines: without a terminal, tell the text every ten seconds.

    Yields:
        What moves it: `move()` by one step, `move(completed=..., total=..., text=...)` to somewhere.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console, told = Console(stderr=True), time.perf_counter()
    has_bar = visible and console.is_terminal
    with Progress(console=console, disable=not has_bar, transient=transient) as bar:
        task = bar.add_task(escape(shown(text)), total=total)

        def move(*, completed: float | None = None, total: float | None = None, text: str | None = None) -> None:
            nonlocal told
            step = 1.0 if completed is None and text is None else None
            description = None if text is None else escape(shown(text))
            bar.update(task, advance=step, completed=completed, total=total, description=description)
            if lines and text is not None and not has_bar and time.perf_counter() - told >= LINE_SECONDS:
                told = time.perf_counter()
                tell(text)

        yield move


class Formatter(logging.Formatter):
    """Log records as `shown`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines."""
        return shown(super().format(record), multiline=True)


def guard_tracebacks() -> None:
    """Let also the tracebacks of this process, and its log records without a log file, be as `shown`."""
    sys.excepthook = lambda kind, error, trace: _tell_traceback("", traceback.format_exception(kind, error, trace))
    threading.excepthook = lambda args: _tell_traceback(
        f"Exception in thread {args.thread.name if args.thread else None}:\n",
        traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback),
    )
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(Formatter())


def _tell_traceback(head: str, lines: list[str]) -> None:
    tell(head + "".join(lines).rstrip("\n"), multiline=True)

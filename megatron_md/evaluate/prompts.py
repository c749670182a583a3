"""Where prompts come from, the placeholders in them, and which of them go through the model together."""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_md.data.entries import Message
from megatron_md.errors import UserError
from megatron_md.json_file import LARGE, as_record, parse_json, read_regular
from megatron_md.messages import say
from megatron_md.together import on_main

if TYPE_CHECKING:
    from megatron_md.data.tokenizer import Tokenizer
    from megatron_md.parallel import World

PLACEHOLDER = re.compile(r"\[\[([0-9]{1,9})\]\]")
MOST_OPEN = 1_000_000  # tokens of a placeholder, before anything knows the model's context


@dataclass(frozen=True)
class Prompt:
    """A text to continue or to fill in.

    Attributes:
        text: as it was written; of a dialogue its last message.
        where: what messages call it.
        messages: the whole dialogue, where there is more than one message.
    """

    text: str
    where: str = "--prompt"
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class _Dialogue:
    messages: tuple[Message, ...]


def read_prompts(path: Path, *, chat: bool = False) -> list[Prompt]:
    """The prompts of a file: each line of a text, or "prompt" of each line of a `.jsonl`; blank lines are left out.

    Args:
        path: the file.
        chat: a line of a `.jsonl` may hold "messages" instead, each with "role" and "content".

    Raises:
        UserError: the file is missing or holds no prompt, or a line is not what it should be (its number is named).
    """
    if not path.is_file():
        raise UserError(f"--prompts-file {path}: no such file")
    data = read_regular(path, "give a smaller file", most_bytes=LARGE)
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        at = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {at}: not UTF-8; write the prompts in UTF-8") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} line {number}"
            prompt = Prompt(line.removesuffix("\r"), where)
            prompts.append(_from_json(line, where, chat=chat) if path.suffix == ".jsonl" else prompt)
    if not prompts:
        raise UserError(f"--prompts-file {path}: holds no prompt; write one on each line")
    return prompts


def _from_json(line: str, where: str, *, chat: bool) -> Prompt:
    record = parse_json(line, where, 'write {"prompt": "..."} on each line')
    if chat and isinstance(record, dict) and "messages" in record:
        way_out = 'write {"messages": [{"role": "user", "content": "..."}]} on each line'
        messages = as_record(_Dialogue, record, where, way_out).messages
        if not messages or messages[-1].role == "assistant":
            raise UserError(f"{where}: asks for no answer; {way_out}")
        return Prompt(messages[-1].content, where, messages)
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f'{where}: no text under "prompt"; write {{"prompt": "..."}} on each line')
    return Prompt(prompt, where)


def typed_prompts(world: World) -> Iterator[Prompt]:
    """The lines of standard input up to an empty one or the end."""
    for number, line in enumerate(typed_lines(world), start=1):
        if not line:
            return
        yield Prompt(line, f"line {number}")


def typed_lines(world: World) -> Iterator[str]:
    """What the main rank reads from standard input, line by line up to its end; every rank gets it."""
    if world.is_main and hasattr(sys.stdin, "reconfigure"):
        # What is not UTF-8 is refused by the tokenizer, on every rank.
        sys.stdin.reconfigure(errors="surrogateescape")
    while (line := on_main(_typed_line)) is not None:
        yield line


def _typed_line() -> str | None:
    """The next line without its end; None where there is none."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401  (input() then knows the arrow keys)

        try:
            return input("> ")
        except EOFError:
            say("")
            return None
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def canvas_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text in which each placeholder `[[n]]` became n mask tokens.

    Raises:
        UserError: there is none, or its number is out of range.
    """
    tokens: list[int] = []
    # re.split with one group alternates what lies between the matches and the group.
    for number, part in enumerate(PLACEHOLDER.split(text)):
        if number % 2:
            if not 1 <= int(part) <= MOST_OPEN:
                raise UserError(f"the placeholder [[{part}]] must hold a number from 1 to {MOST_OPEN}, as in [[5]]")
            tokens += [tokenizer.mask_token_id] * int(part)
        elif part:
            tokens += tokenizer.encode(part).tolist()
    if tokenizer.mask_token_id not in tokens:
        raise UserError("no placeholder to fill in; write [[5]] where five tokens are to be found")
    return tokens


def batches(keys: Sequence[Hashable], size: int) -> list[list[int]]:
    """Places of equal keys together, at most `size` in a batch, in the order in which a key first appears."""
    groups: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]

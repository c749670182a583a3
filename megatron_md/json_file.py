"""Reading JSON that somebody else may have written, edited or damaged.

Only regular files are opened (a FIFO would be waited for without end), and their content is kept within limits that no
sound file comes near. Whatever else there is ends in one line that names the file and the way out.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from megatron_md.errors import UserError

T = TypeVar("T")

MOST_BYTES = 1 << 24
LARGE = 1 << 28  # manifests of trillions of tokens, tokenizers, indexes of weights
DEEPEST = 64
LONGEST_NUMBER = 40  # characters


def read_regular(path: Path, advice: str, *, most_bytes: int = MOST_BYTES, error: type[UserError] = UserError) -> bytes:
    """The content of a regular file; others are not waited for.

    Args:
        path: the file.
        advice: the way out, for the message.
        most_bytes: longest content that is read.
        error: what to raise; it takes the message.

    Raises:
        UserError: there is no such file, it is no regular one, cannot be read, or is longer.
    """
    problem, data = "", b""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                problem = "is a directory" if stat.S_ISDIR(status.st_mode) else "is not a regular file"
            elif status.st_size > most_bytes:
                problem = f"holds more than {most_bytes} bytes"
            else:
                # By its size: a reading of at most n bytes takes the memory of n.
                with open(descriptor, "rb", closefd=False) as file:
                    data = file.read()
        finally:
            os.close(descriptor)
    except OSError as failure:
        problem = f"cannot be read ({failure.strerror or failure})"
    except ValueError:  # a NUL, or a lone surrogate, in the path
        problem = "cannot be the name of a file"
    if problem:
        raise error(f"{path}: {problem}; {advice}")
    return data


def parse_json(data: bytes | str, source: object, advice: str, *, error: type[UserError] = UserError) -> Any:
    """The value of a JSON text, as every reader of JSON understands it.

    Args:
        data: the text, in UTF-8.
        source: what the message calls it: a path, or a path and a line.
        advice: the way out, for the message.
        error: what to raise; it takes the message.

    Raises:
        UserError: it is no JSON, is nested deeper than `DEEPEST`, or holds a number or a text that JSON has not: NaN,
            one beyond the floats, one of more than `LONGEST_NUMBER` characters, half a surrogate pair.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        value = _DECODER.decode(text)
        problem = _problem(value, text)
    except UnicodeDecodeError as failure:
        problem = f"not UTF-8 at byte {failure.start}"
    except json.JSONDecodeError as failure:
        problem = f"{failure.msg} at line {failure.lineno} column {failure.colno}"
    except RecursionError:
        problem = f"nested deeper than {DEEPEST}"
    except ValueError as failure:
        problem = str(failure)
    if problem:
        raise error(f"{source}: malformed JSON ({problem}); {advice}")
    return value


def read_json(
    path: Path, advice: str, *, most_bytes: int = MOST_BYTES, error: type[UserError] = UserError
) -> dict[str, Any]:
    """The object in a JSON file; arguments as for `read_regular`.

    Raises:
        UserError: as `read_regular` and `parse_json`, or it is no object.
    """
    value = parse_json(read_regular(path, advice, most_bytes=most_bytes, error=error), path, advice, error=error)
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object; {advice}")
    return value


def as_record(schema: type[T], value: Any, source: object, advice: str) -> T:
    """A dataclass from what a JSON file holds.

    Args:
        schema: the dataclass, with its bounds in the annotations.
        value: what was read.
        source: what the message calls it.
        advice: the way out, for the message.

    Raises:
        UserError: an entry is missing, unknown, of another type or out of range.
    """
    try:
        # Strictness as in JSON: dataclasses and tuples come from objects and lists, nothing else converts.
        return cast(T, adapter(cast(Hashable, schema)).validate_json(json.dumps(value), strict=True))
    except ValidationError as failure:
        problem = failure.errors()[0]
    key = "".join(f"{part}: " for part in problem["loc"])
    raise UserError(f"{source}: {key}{problem['msg']}; {advice}")


@lru_cache(maxsize=16)
def adapter(schema: Any) -> TypeAdapter[Any]:
    """The validator of a dataclass; building one takes tens of milliseconds."""
    return TypeAdapter(schema)


def _problem(value: Any, text: str) -> str:
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "a text with half a surrogate pair"
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        inner = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)]
        level = [item for item in inner if isinstance(item, (dict, list))]
    return f"nested deeper than {DEEPEST}" if level else ""


def _integer(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise UserError(f"a number of {len(text)} characters")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UserError(f"the number {text[:LONGEST_NUMBER]}")
    return value


def _constant(text: str) -> float:
    raise UserError(f"the number {text}")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_constant)

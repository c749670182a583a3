"""Reading the JSON lines that a run writes (metrics, samples, events): a damaged line costs that line alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_md.json_file import parse_json


@dataclass(frozen=True)
class Line:
    """A line of a file that is not blank.

    Attributes:
        number: counted from 1.
        content: its bytes, without the end of the line.
        record: what it says; None if it is damaged.
    """

    number: int
    content: bytes
    record: dict[str, Any] | None


def read_lines(path: Path, key: str = "step") -> list[Line]:
    """The lines of metrics.jsonl or samples.jsonl, whatever has happened to them; none where there is no such file.

    Args:
        path: the file.
        key: what every record has; a `step` is a whole number.
    """
    content = path.read_bytes() if path.is_file() else b""
    lines = enumerate(content.split(b"\n"), start=1)
    return [Line(number, line, _record(line, key)) for number, line in lines if line.strip()]


def damage(path: Path, lines: list[Line]) -> str | None:
    """Which of a file's lines are damaged, in words; None if all are whole."""
    numbers = [line.number for line in lines if line.record is None]
    if not numbers:
        return None
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    verb = "lines {} are" if len(numbers) > 1 else "line {} is"
    return f"{path}: {verb.format(', '.join(map(str, numbers[:3])) + more)} damaged"


def lowest(records: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The record with the lowest validation NELBO, the first of equal ones; None if nothing was validated."""
    return min(
        (one for one in records if is_number(one.get("val_nelbo"))), key=lambda one: one["val_nelbo"], default=None
    )


def has_overfitted(records: Sequence[dict[str, Any]]) -> bool:
    """Whether the newest validation NELBO is above the lowest one by more than its own standard error."""
    best, newest = lowest(records), next((one for one in reversed(records) if lowest([one])), None)
    if best is None or newest is None:
        return False
    error = newest.get("val_nelbo_stderr")
    return bool(newest["val_nelbo"] - best["val_nelbo"] > (error if is_number(error) else 0.0))


def is_number(value: Any) -> bool:
    """Whether a figure of a record is one: null stands for what is not finite, and a foreign file may hold anything."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _record(line: bytes, key: str) -> dict[str, Any] | None:
    try:
        record = parse_json(line, "", "")
    except ValueError:
        return None
    if not isinstance(record, dict) or key not in record:
        return None
    return record if key != "step" or (type(record[key]) is int and 0 <= record[key] < 2**63) else None

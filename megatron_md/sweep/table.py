"""The table of a sweep: a CSV file with a line for every run that is done, and the same as JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_md.errors import UserError
from megatron_md.files import replace_file

Row = dict[str, str]


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a line for each run into PATH and, as JSON, into PATH with the suffix .jsonl; each whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.getvalue())
    replace_file(path.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


def read_csv(path: Path, command: str) -> list[Row]:
    """The lines of a table.

    Args:
        path: the file.
        command: what makes it.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it with `{command}`")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The lines of each arm, in order of appearance."""
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return arms

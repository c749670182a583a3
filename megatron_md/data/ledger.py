"""The quarantine ledger: the damaged documents that a run goes on without.

RUN/quarantine.jsonl holds a line per document, and so does every checkpoint, so that a resumed run leaves out what the
run had left out before, whatever has happened to the files since.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict

from megatron_md.batch import DamagedDocument
from megatron_md.files import replace_file
from megatron_md.json_file import as_record, parse_json, read_regular

LEDGER_NAME = "quarantine.jsonl"


@dataclass(frozen=True)
class _Line(DamagedDocument):
    __pydantic_config__ = ConfigDict(extra="forbid")

    step: int


class QuarantineLedger:
    """Damaged documents, each once, with the step that first met it."""

    def __init__(self) -> None:
        self._steps: dict[DamagedDocument, int] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[DamagedDocument]:
        return iter(self._steps)

    def __contains__(self, document: DamagedDocument) -> bool:
        return document in self._steps

    def add(self, documents: Iterable[DamagedDocument], step: int) -> None:
        """Add those that are not in it yet, in an order that does not depend on theirs."""
        for document in sorted(documents):
            self._steps.setdefault(document, step)

    def text(self) -> str:
        """The content of the file: one JSON line per document."""
        lines = [{"step": step, **asdict(document)} for document, step in self._steps.items()]
        return "".join(json.dumps(line) + "\n" for line in lines)

    def write(self, path: Path) -> None:
        """Write the file so that readers see the old or the new one, never a part."""
        replace_file(path, self.text())

    @classmethod
    def read(cls, path: Path) -> QuarantineLedger:
        """Read a ledger; no file is an empty one.

        Raises:
            UserError: a line is malformed.
        """
        ledger = cls()
        if not path.exists():
            return ledger
        way_out = "no line of a quarantine ledger"
        for number, line in enumerate(read_regular(path, way_out).split(b"\n"), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                entry = as_record(_Line, parse_json(line, where, way_out), where, way_out)
                ledger.add([DamagedDocument(entry.corpus, entry.shard, entry.document, entry.tokens)], entry.step)
        return ledger

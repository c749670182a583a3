"""The ledger: each document once, the file as good as the ledger."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_md.batch import DamagedDocument
from megatron_md.data.ledger import QuarantineLedger

A, B, C = (DamagedDocument("0" * 64, f"shard-{n:06d}.tar", 7 - n, 10 * n) for n in range(3))


def test_documents_are_kept_once_with_their_first_step(tmp_path: Path) -> None:
    ledger = QuarantineLedger()
    ledger.add([C, A], 3)
    ledger.add({A, B}, 5)
    assert list(ledger) == [A, C, B] and len(ledger) == 3 and B in ledger
    ledger.write(tmp_path / "ledger.jsonl")
    again = QuarantineLedger.read(tmp_path / "ledger.jsonl")
    assert list(again) == list(ledger) and again.text() == ledger.text()
    assert ledger.text().splitlines()[2].startswith('{"step": 5, ') and len(list(tmp_path.iterdir())) == 1


def test_no_file_is_an_empty_ledger_and_a_bad_line_is_named(tmp_path: Path) -> None:
    assert not len(QuarantineLedger.read(tmp_path / "none"))
    for bad in ["{", "[]", '{"step": 1}', '{"corpus": "a"}']:
        (tmp_path / "bad").write_text(QuarantineLedger().text() + bad)
        with pytest.raises(ValueError, match=r"bad, line 1: .*no line of a quarantine ledger"):
            QuarantineLedger.read(tmp_path / "bad")

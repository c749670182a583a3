"""Progress: a line now and then where nobody watches, a bar on a terminal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_md.commands import progress as module
from megatron_md.commands.progress import progress


def test_lines_are_apart_in_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 10.0, 10.0, 19.0, 21.0, 21.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.__next__))
    with progress("{} done".format) as moved:
        for done in range(1, 5):
            moved(done)
    assert capsys.readouterr().err == "2 done\n4 done\n"


@pytest.mark.parametrize("total", [None, 4])
def test_a_terminal_has_a_bar(
    total: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "80")
    with progress("{} done".format, total) as moved:
        moved(3)
    shown = capsys.readouterr().err
    assert "3 done" in shown and ("75%" in shown) == (total is not None)

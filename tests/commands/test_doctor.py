"""`megatron-md doctor`: one report for what is wrong, and an exit code that says whether training runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_md.cli import main
from tests.test_installed import BROKEN, write_package


@pytest.mark.slow  # the test of the documentation starts it too
@pytest.mark.distributed
def test_training_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--nproc-per-node", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    states = {line[8:28].strip(): line[:8].strip() for line in lines if not line.lstrip().startswith("->")}
    for name in ("python", "packages", "torch", "megatron-core", "collectives", "one step"):
        assert states[name] == "ok", lines
    assert lines[-1] == "training runs here"


@pytest.mark.distributed
def test_what_breaks_it_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_package(tmp_path, "transformer_engine", BROKEN["RuntimeError"])
    write_package(tmp_path, "apex")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert main(["doctor", "--nproc-per-node", "1"]) == 1
    report = capsys.readouterr().out
    for line in ("broken  megatron-core", "broken  transformer_engine", "broken  apex", "broken  one step"):
        assert line in report
    assert "ok      collectives" in report
    assert f"-> install one that fits this torch and its CUDA, or remove it: take {tmp_path}" in report
    assert report.endswith("training does not run here\n")


def test_a_rank_of_a_job_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 2
    assert "without torchrun" in capsys.readouterr().err

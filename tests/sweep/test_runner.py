"""Runs in processes of their own: one that dies or fails costs itself alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from megatron_md.sweep.plan import SweepRun
from megatron_md.sweep.runner import LOG_NAME, in_processes


def work(config: str) -> None:
    print("begun", config, os.environ["OMP_NUM_THREADS"])
    if config == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if config == "fails":
        raise ValueError("planted")


def test_a_run_that_dies_costs_itself_alone(tmp_path: Path) -> None:
    runs = [SweepRun(name, "", 1, tmp_path / name, name) for name in ("dies", "fails", "first", "second")]
    ended = {run.arm: error for run, error in in_processes(work, runs, 2)}
    assert ended == {
        "dies": "its process died with exit code -9", "fails": "ValueError: planted", "first": None, "second": None,
    }  # fmt: skip
    assert (tmp_path / "first" / LOG_NAME).read_text() == "begun first 1\n"
    log = (tmp_path / "fails" / LOG_NAME).read_text()
    assert "Traceback" in log and log.endswith("ValueError: planted\n")

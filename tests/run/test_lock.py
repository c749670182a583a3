"""The lock of a run directory: who holds it, who is refused, and that it ends with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_md import run_files
from megatron_md.parallel import World
from megatron_md.run.lock import _lock, only_job
from tests.ranks import run_ranks

HOLDER = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)\n"


def hold(run_dir: Path, seconds: int) -> subprocess.Popen[str]:
    """Another process that has the lock when this returns."""
    words = [sys.executable, "-c", f"{HOLDER}time.sleep({seconds})", str(run_dir / run_files.LOCK)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline()
    return holder


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    holder = hold(tmp_path, 60)
    try:
        with pytest.raises(BlockingIOError):
            _lock(tmp_path, 0.0)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    _lock(tmp_path, 0.0).close()


def test_a_job_that_is_about_to_end_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = hold(tmp_path, 1)
    _lock(tmp_path, 60.0).close()
    assert holder.wait() == 0
    assert capsys.readouterr().err.count("another job holds this run directory; it is given 60 s to end") == 1


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    _lock(tmp_path, 0.0).close()


def enter(run_dirs: list[Path]) -> list[str]:
    """What a rank hears on its way into each of some run directories."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World(rank, size, torch.device("cpu"), data_rank=rank, data_size=size, is_last_stage=True)
    torch.distributed.init_process_group("gloo")
    said = []
    for run_dir in run_dirs:
        try:
            with only_job(run_dir, world, wait_seconds=0.0):
                said.append("in")
        except ValueError as error:
            said.append(str(error))
    torch.distributed.destroy_process_group()
    return said


@pytest.mark.distributed
def test_all_ranks_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "held").mkdir()
    holder = hold(tmp_path / "held", 60)
    try:
        # Twice into one directory: a run that has ended has dropped its lock, in the same process as well.
        first, second = run_ranks(enter, 2, [tmp_path / name for name in ("file", "run", "run", "held")])
    finally:
        holder.kill()
        holder.wait()
    assert first == second and first[1:3] == ["in", "in"]
    assert "cannot be written" in first[0] and "another job trains" in first[3]

"""What a process leaves behind when it is killed: no children, no temporary folders."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_md.processes import scratch_folder

GONE_WITHIN = 10.0  # seconds, the promise of docs/faults.md


def marked(marker: str) -> list[psutil.Process]:
    """The living processes whose environment holds this marker: they cannot lose it as they lose their parent."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TEST_MARKER") == marker:
                found.append(process)
        except psutil.Error:
            continue
    return found


def left_after(marker: str, seconds: float = GONE_WITHIN) -> list[list[str]]:
    """Command lines of the marked processes that are still there after this time; they are killed."""
    deadline = time.monotonic() + seconds
    while (left := marked(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    commands = [process.cmdline() for process in left]
    for process in left:
        process.kill()
    return commands


CHILD = """
import os, signal, sys, time
from megatron_md.processes import die_with_parent
die_with_parent(int(sys.argv[1]))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""
PARENT = f"""
import os, subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}, str(os.getpid())])
"""


def test_a_child_ends_with_its_killed_parent(tmp_path: Path) -> None:
    marker = str(tmp_path)
    environment = {**os.environ, "TEST_MARKER": marker}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        assert len(marked(marker)) == 2
        parent.kill()
        assert left_after(marker) == []


def test_a_child_that_starts_too_late_for_its_parent_ends_at_once() -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    late = subprocess.run([sys.executable, "-c", CHILD, str(dead.pid)], stdout=subprocess.PIPE, timeout=60)
    assert late.returncode == 1 and late.stdout == b""


HOLDER = """
import time
from megatron_md.processes import scratch_folder
with scratch_folder() as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


def test_folders_of_killed_processes_are_removed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    dead, living = (Path(holder.stdout.readline().strip()) for holder in holders if holder.stdout)
    (dead / "exit_code").write_text("0")
    foreign = tmp_path / "megatron_md_of_somebody"
    foreign.mkdir()
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("kept")
    (tmp_path / "megatron_md_job_link").symlink_to(secret)
    holders[0].kill()
    holders[0].communicate()
    try:
        with scratch_folder() as folder:
            assert folder.parent == tmp_path and folder.is_dir()
            assert not dead.exists() and living.is_dir() and foreign.is_dir() and (secret / "file").is_file()
        assert not folder.exists()
    finally:
        holders[1].kill()
        holders[1].communicate()

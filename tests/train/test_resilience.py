"""A rank that hangs ends itself and says where it hung."""

from __future__ import annotations

import subprocess
import sys

HANG = """
import time
from megatron_md.train.resilience import Watchdog
watchdog = Watchdog({seconds})
watchdog.alive()
def stuck_in_a_collective():
    time.sleep({sleep})
stuck_in_a_collective()
watchdog.stop()
time.sleep(0.6)
print("done")
"""


def run(seconds: float, sleep: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HANG.format(seconds=seconds, sleep=sleep)], capture_output=True, text=True, timeout=60
    )


def test_stacks_are_printed_and_the_process_ends() -> None:
    result = run(0.5, 60)
    assert result.returncode == 1 and "stuck_in_a_collective" in result.stderr


def test_a_process_that_works_is_left_alone() -> None:
    result = run(0.5, 0.01)
    assert result.returncode == 0 and result.stdout == "done\n" and not result.stderr

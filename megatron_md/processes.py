"""Children that end with their parent, and temporary folders that a killed process leaves to the next one's start."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

# The launcher's process id, for the workers that it starts.
PARENT_VARIABLE = "MEGATRON_MD_PARENT"
_FOLDERS = "megatron_md_job_"
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the system kill this process as soon as its parent is gone, however that ends (`kill -9` included).

    To be called first of all, as before it nothing ends this process. The system takes the *thread* that started this
    process for its parent: parents start children from their main thread, or from one that waits for them.

    Args:
        parent: process id that the parent has told; where it is no longer the parent's, this process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end_with_launcher() -> None:
    """`die_with_parent`, where a launcher of ours has started this process."""
    # Taken out, as what this process starts is no child of the launcher.
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is not None:
        die_with_parent(int(parent))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder; those that killed processes of this user have left are removed first.

    Whoever has one holds a lock on it, which the system drops with its process; children do not inherit it.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
        with suppress(OSError), _locked(folder, fcntl.LOCK_NB):  # in use, another user's, or gone
            if folder.stat().st_uid == os.geteuid():
                shutil.rmtree(folder)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_FOLDERS))
        with ExitStack() as stack:
            try:
                stack.enter_context(_locked(folder))
            except FileNotFoundError:
                continue  # it was taken for a dead one's before it was opened
            if not folder.is_dir():
                continue  # or before it was locked
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)

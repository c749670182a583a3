"""One job at a time in a run directory: two of them would write each other's metrics and checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from megatron_md import run_files
from megatron_md.errors import UserError
from megatron_md.messages import tell
from megatron_md.parallel import World
from megatron_md.together import on_main
from megatron_md.train.logs import logger

WAIT_SECONDS = 100.0  # the workers of a killed job end in seconds; NFS keeps a dead machine's locks for 90 s by default
RESTART_WAIT_SECONDS = 5.0  # a launcher that restarts its workers has seen the ones before them end, if it had all
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def only_job(run_dir: Path, world: World, *, wait_seconds: float | None = None) -> Iterator[None]:
    """Keep other jobs out of a run directory while the block runs; every rank enters it, the main one holds the lock.

    The lock is a `flock`, which the system drops with its process, however that ends. A file system without locks is
    used without one.

    Args:
        run_dir: made if it is not there.
        world: this process's place in the job.
        wait_seconds: how long the holder of the lock is given to end; by default, what it may need.

    Raises:
        UserError: on all ranks: another job holds the lock, or the directory cannot be written.
    """
    if wait_seconds is None:
        is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        is_one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        wait_seconds = RESTART_WAIT_SECONDS if is_restart and is_one_node else WAIT_SECONDS
    with ExitStack() as held:

        def hold() -> None:
            try:
                held.enter_context(_lock(run_dir, wait_seconds))
            except BlockingIOError:
                raise UserError(
                    f"{run_dir}: another job trains in this run directory: stop it, or choose another run_dir"
                ) from None
            except OSError as error:
                raise UserError(
                    f"{run_dir}: run_dir cannot be written ({error.strerror or error}): choose another one"
                ) from None

        on_main(hold)
        yield


def _lock(run_dir: Path, wait_seconds: float) -> IO[str]:
    """The locked file.

    Raises:
        BlockingIOError: another process has held it all the time.
        OSError: it cannot be opened for writing.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / run_files.LOCK).open("a")
    deadline, is_told = time.monotonic() + wait_seconds, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                raise
            if not is_told:
                line = f"another job holds this run directory; it is given {wait_seconds:.0f} s to end"
                tell(f"megatron-md: {run_dir}: {line}")
                is_told = True
            time.sleep(0.2)
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            logger.warning("%s: no lock on this file system (%s)", run_dir, os.strerror(error.errno))
        return file

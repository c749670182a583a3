"""How a run's processes end: the exit codes that `megatron-md train` promises, and the exceptions that lead to them."""

from __future__ import annotations

import os
from pathlib import Path

EXIT_DONE, EXIT_ERROR, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 75
# Between worker and launcher only: another rank has failed, and has said why.
EXIT_PEER_FAILED = 76

# The launcher's wish to hear a worker's final exit code through a file: a code other than 0 would make it restart.
VERDICT_VARIABLE = "MEGATRON_MD_VERDICT"


class UserError(ValueError):
    """Bad input: exit code 2, its lines once, no traceback."""


class RunFailedError(Exception):
    """The run cannot go on for a reason that every rank knows: exit code 1, its lines once, no traceback."""


class PeerFailedError(SystemExit):
    """Another rank has failed first and says why; this one ends without a word."""

    def __init__(self, code: int = EXIT_PEER_FAILED) -> None:
        super().__init__(code)


def final(code: int) -> int:
    """What a worker has to return so that its launcher does not restart it after an end that all ranks agree upon.

    A launcher with restarts takes every code but 0 for a fault. That of `megatron-md train` learns the true code from a
    file of this machine; `torchrun --max-restarts` hears 0 for a run that was stopped on request.
    """
    path = os.environ.get(VERDICT_VARIABLE)
    if path is not None and "RANK" in os.environ:
        Path(path).write_text(str(code))
        return EXIT_DONE
    if code == EXIT_STOPPED and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        return EXIT_DONE
    return code


def hang_mark() -> Path | None:
    """The file by which the workers tell their launcher that they have hung; None where nobody asks."""
    path = os.environ.get(VERDICT_VARIABLE)
    return None if path is None else Path(path).with_name("hung")

"""RUN/logs/rank_N.log: what each process has to say for itself, its last words included."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from megatron_md.messages import Formatter
from megatron_md.parallel import World

logger = logging.getLogger("megatron_md")


def rank_log(run_dir: Path, rank: int) -> Path:
    """Where a rank writes."""
    return run_dir / "logs" / f"rank_{rank}.log"


class _RankLog(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk must not fill the terminal with logging's own tracebacks."""


def open_rank_log(run_dir: Path, world: World) -> None:
    """Append this process's log, with megatron-core's and torch's warnings, to its own file."""
    path = rank_log(run_dir, world.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _RankLog(path)
    handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.INFO)
    logging.getLogger().addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.info(
        "rank %d of %d on %s, process %d, %s, data-parallel rank %d of %d%s",
        world.rank,
        world.size,
        socket.gethostname(),
        os.getpid(),
        world.device,
        world.data_rank,
        world.data_size,
        ", last pipeline stage" if world.is_last_stage else "",
    )

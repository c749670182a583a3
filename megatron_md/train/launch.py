"""Starts the worker processes of `megatron-md train` through torch's elastic launcher, with a quiet report.

The workers run `python -m megatron_md train …` exactly as under torchrun.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_md.train.resilience import EXIT_BAD_INPUT, EXIT_DONE, EXIT_ERROR, EXIT_STOPPED

SHUTDOWN_SECONDS = 3600  # the workers finish their step and write a checkpoint first


def launch(
    config_path: str,
    overrides: Sequence[str],
    run_dir: str,
    *,
    nproc_per_node: int,
    nnodes: int = 1,
    rdzv_endpoint: str | None = None,
) -> int:
    """Run the workers of this node to their end.

    Args:
        config_path: the YAML file.
        overrides: dotted overrides, as given on the command line.
        run_dir: the run's directory, whose summary tells how the workers ended after a signal.
        nproc_per_node: workers on this node.
        nnodes: nodes of the job.
        rdzv_endpoint: host:port where the nodes meet; needed for more than one node.

    Returns:
        The exit code that `megatron-md train` promises.
    """
    # One thread per core over all workers, unless the user knows better.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc_per_node)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    started = time.time()
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    # Older releases of torch lack one or both; without them a stop is less patient, or not heard.
    wanted: dict[str, Any] = {
        "signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "shutdown_timeout": SHUTDOWN_SECONDS,
    }
    config = LaunchConfig(
        min_nodes=nnodes,
        max_nodes=nnodes,
        nproc_per_node=nproc_per_node,
        run_id=os.environ.get("MEGATRON_MD_JOB_ID", "megatron-md" if nnodes > 1 else uuid.uuid4().hex),
        rdzv_backend="c10d",
        rdzv_endpoint=rdzv_endpoint or "127.0.0.1:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        **{key: value for key, value in wanted.items() if key in known},
    )
    if "signals_to_handle" not in known:
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    command = ("-m", "megatron_md", "train", config_path, *overrides)
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
        if failure.exitcode in (EXIT_BAD_INPUT, EXIT_STOPPED):
            return int(failure.exitcode)
        print(
            f"megatron-md: rank {rank} ended with exit code {failure.exitcode}; its message is above", file=sys.stderr
        )
        return EXIT_ERROR
    except (SignalException, KeyboardInterrupt):
        return _after_signal(Path(run_dir), started)
    return EXIT_DONE


def _after_signal(run_dir: Path, started: float) -> int:
    """Exit code after a signal; ends workers that a second signal has left behind."""
    summary = run_dir / "summary.json"
    for child in psutil.Process().children(recursive=True):
        child.kill()
    try:
        # A summary from before this start says nothing about it.
        is_ours = summary.stat().st_mtime >= started
        status = json.loads(summary.read_text())["status"] if is_ours else "failed"
    except (OSError, json.JSONDecodeError, KeyError):
        status = "failed"
    return {"finished": EXIT_DONE, "stopped": EXIT_STOPPED}.get(status, EXIT_ERROR)

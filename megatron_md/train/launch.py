"""Starts the workers of `megatron-md train` and `parity` through torch's elastic launcher, with a quiet report.

The workers run `python -m megatron_md …` exactly as under torchrun.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import psutil
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_md.errors import EXIT_ERROR, EXIT_PEER_FAILED, VERDICT_VARIABLE, RunFailedError
from megatron_md.messages import tell
from megatron_md.processes import PARENT_VARIABLE, scratch_folder
from megatron_md.train import nodes

FAILURE_SECONDS = 10  # what the other workers get to end once one has failed


def launch(
    config_path: str,
    overrides: Sequence[str],
    *,
    nproc_per_node: int,
    nnodes: int = 1,
    rdzv_endpoint: str | None = None,
    max_restarts: int = 0,
    hang_timeout: float = 600.0,
    command: Sequence[str] = ("train",),
) -> int:
    """Run the workers of this node to their end.

    Args:
        config_path: the YAML file.
        overrides: dotted overrides, as given on the command line.
        nproc_per_node: workers on this node.
        nnodes: nodes of the job.
        rdzv_endpoint: host:port where the nodes meet; needed for more than one node.
        max_restarts: how often all workers are started anew, from the newest checkpoint, after one has failed.
        hang_timeout: `train.hang_timeout`, in seconds.
        command: words of the command line that stand before `config_path`.

    Returns:
        The exit code that `megatron-md train` promises.

    Raises:
        RunFailedError: the nodes have not met, or have lost one another.
    """
    # One thread per core over all workers, unless the user knows better.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc_per_node)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    SubprocessContext.close = _close  # type: ignore[method-assign, assignment]
    words = ("-m", "megatron_md", *command, config_path, *overrides)
    with scratch_folder() as folder:
        verdict = folder / "exit_code"
        os.environ[VERDICT_VARIABLE] = str(verdict)
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        try:
            elastic_launch(
                _launch_config(nproc_per_node, nnodes, rdzv_endpoint, max_restarts, hang_timeout), sys.executable
            )(*words)
        except ChildFailedError as error:
            tell(f"megatron-md: {_first_failure(error.failures)}")
            return EXIT_ERROR
        except (RendezvousError, DistError) as error:
            raise RunFailedError(nodes.why_apart(error, str(rdzv_endpoint), nnodes)) from None
        except (SignalException, KeyboardInterrupt):
            pass
        finally:
            del os.environ[PARENT_VARIABLE]
            # Those that a second signal, or an error of the launcher itself, has left behind.
            for child in psutil.Process().children(recursive=True):
                child.kill()
        return int(verdict.read_text()) if verdict.is_file() else EXIT_ERROR


_torch_close = SubprocessContext.close


def _close(workers: SubprocessContext, death_sig: signal.Signals | None = None, timeout: int = FAILURE_SECONDS) -> None:
    """As torch does it, but for the default: it waits 30 s for the peers of a failed worker, with no option for it.

    A stopped process, and one that hangs in C code, need the SIGKILL that comes then.
    """
    _torch_close(workers, death_sig, timeout)


def _launch_config(
    nproc_per_node: int, nnodes: int, rdzv_endpoint: str | None, max_restarts: int, hang_timeout: float
) -> LaunchConfig:
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    # Older releases of torch lack one or both; without them a stop is less patient, or not heard.
    wanted: dict[str, Any] = {
        "signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        # The workers finish their step, validate and save, each within hang_timeout.
        "shutdown_timeout": int(3 * hang_timeout) + 60,
    }
    if "signals_to_handle" not in known:
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    return LaunchConfig(
        min_nodes=nnodes,
        max_nodes=nnodes,
        nproc_per_node=nproc_per_node,
        run_id=os.environ.get("MEGATRON_MD_JOB_ID", "megatron-md" if nnodes > 1 else uuid.uuid4().hex),
        rdzv_backend=nodes.BACKEND,
        rdzv_configs={"hang_timeout": hang_timeout},
        rdzv_endpoint=rdzv_endpoint or "127.0.0.1:0",
        max_restarts=max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        **{key: value for key, value in wanted.items() if key in known},
    )


def _first_failure(failures: dict[int, ProcessFailure]) -> str:
    """Which rank began it; those that ended because of another one, or were ended for it, come after it."""
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode == EXIT_PEER_FAILED, item[1].timestamp))
    if failure.exitcode < 0:
        return f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}"
    return f"rank {rank} ended with exit code {failure.exitcode}; its message is above"

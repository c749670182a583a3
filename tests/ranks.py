"""`run_ranks`: run a function on several real processes with real gloo, without paying for imports each time."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# CUDA does not outlive a fork, not even where it was only asked whether it is there.
_CONTEXT: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
if _CONTEXT.get_start_method() == "forkserver":
    _CONTEXT.set_forkserver_preload(
        ["megatron_md.run.pretrain", "megatron_md.checkpoint.manager", "torch.utils.tensorboard"]
    )


class RankError(AssertionError):
    """A rank raised; the message is that rank's traceback."""


def _worker(fn: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], result: Connection) -> None:
    os.environ.update(env)
    try:
        # Plain pickle: multiprocessing's own would pass tensors through shared memory that dies with this process.
        result.send_bytes(pickle.dumps((True, fn(*args))))
    except BaseException:
        result.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        result.close()


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0) -> list[Any]:
    """Call `fn(*args)` on `world_size` processes that find each other as under torchrun.

    Args:
        fn: a module-level function; what it returns must be picklable.
        world_size: number of processes; 1 runs without RANK in the environment, as a plain start does.
        args: arguments of `fn`.
        timeout: seconds after which all of them are killed.

    Returns:
        The ranks' return values, in order.

    Raises:
        RankError: a rank raised, died or did not finish in time; the first one to fail is named.
    """
    # The parent holds the store, so that no port can be taken between its choice and its use.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], {}
    for rank in range(world_size):
        env = {"OMP_NUM_THREADS": "1"}
        if world_size > 1:
            env |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
        receive, send = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_worker, args=(fn, args, env, send))
        process.start()
        send.close()
        processes.append(process)
        pipes[receive] = rank
    try:
        return _collect(pipes, world_size, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _collect(pipes: dict[Connection, int], world_size: int, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(pipes.values())} did not finish in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.pop(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died without a word") from None
            if not ok:
                raise RankError(f"rank {rank} of {world_size}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(world_size)]

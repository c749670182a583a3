"""How the launchers of a job's nodes meet: torch's rendezvous, with the loss of nodes thought through.

All processes of the job talk through one store, which the launcher on the machine of `--rdzv-endpoint` holds. Whoever
starts workers anew, and whether that counts as a restart of theirs, differs from node to node: the round does not.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from megatron_md.errors import EXIT_ERROR, RunFailedError, UserError, hang_mark
from megatron_md.parallel import ROUND_VARIABLE

BACKEND = "megatron-md"
PORT = 29400  # torch's own default
JOIN_SECONDS = 600.0  # how long nodes wait for those that are not there (yet, or any more)
JOIN_SECONDS_AFTER_HANG = 40.0  # the missing ones have had hang_timeout already; the living need up to 30 s
SILENCE_SECONDS = 30.0  # beyond hang_timeout, within which the workers speak and a link may come back
PING_SECONDS = 5.0
AGAIN = "start the same command again on all nodes, and the run goes on from its newest checkpoint"


def why_apart(error: Exception, endpoint: str, nnodes: int) -> str:
    """One line on an error of the rendezvous or of its store: what is lost, and what to do."""
    if isinstance(error, RendezvousClosedError):
        return f"another node has ended the job, and says why; {AGAIN}"
    if isinstance(error, RendezvousTimeoutError):
        return f"waited in vain for all {nnodes} nodes to meet at {endpoint} ({AGAIN})"
    return f"lost the node at {endpoint}, which holds the job's store: {AGAIN}"


class Rendezvous(RendezvousHandler):
    """Torch's handler, whose rounds have a number that all workers of a round share, in one store for all rounds."""

    def __init__(self, handler: RendezvousHandler, store: dist.TCPStore, host: str, patience: _Patience) -> None:
        """Wrap `handler`, which keeps its state in `store` at `host`; it waits for nodes as `patience` says."""
        self._handler = handler
        self._store = store
        self._host = host
        self._patience = patience

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all nodes; the workers to be started find the round's number in their environment."""
        mark = hang_mark()
        has_hung = mark is not None and mark.exists()
        self._patience.seconds = JOIN_SECONDS_AFTER_HANG if has_hung else JOIN_SECONDS
        if mark is not None:
            mark.unlink(missing_ok=True)
        info = self._handler.next_rendezvous()
        if info.rank == 0:
            info.store.set(ROUND_VARIABLE, str(self._store.add(ROUND_VARIABLE, 1) - 1))
        os.environ[ROUND_VARIABLE] = info.store.get(ROUND_VARIABLE).decode()
        # Not torch's choice, a second store whose address a node keeps even when the node that held it is gone.
        address = RendezvousStoreInfo(self._host, self._store.port)
        return RendezvousInfo(info.store, info.rank, info.world_size, address)

    @property
    def use_agent_store(self) -> bool:
        """The workers use a store of the launchers."""
        return True

    def get_backend(self) -> str:
        """The name this kind of rendezvous is registered by."""
        return BACKEND

    def get_run_id(self) -> str:
        """The job's name."""
        return self._handler.get_run_id()

    def is_closed(self) -> bool:
        """Whether the job has ended on some node."""
        return self._handler.is_closed()

    def set_closed(self) -> None:
        """End the job for all nodes."""
        self._handler.set_closed()

    def num_nodes_waiting(self) -> int:
        """Number of nodes that want to come in, because they are new or because a worker of theirs has failed."""
        return self._handler.num_nodes_waiting()

    def shutdown(self) -> bool:
        """Leave, and end the job for all nodes."""
        return self._handler.shutdown()


class _Patience(RendezvousTimeout):
    seconds = JOIN_SECONDS

    @property
    def join(self) -> timedelta:
        return timedelta(seconds=self.seconds)


def _create(params: RendezvousParameters) -> Rendezvous:
    # Torch would hold a second store on the node of rank 0.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        host, _ = parse_rendezvous_endpoint(params.endpoint, PORT)
    except ValueError as error:
        raise UserError(f"--rdzv-endpoint: {error}") from None
    backend, store = _meet(params, host)
    assert isinstance(store, dist.TCPStore)
    if not params.get_as_bool("is_host"):
        _guard(host, store.port, float(params.get("hang_timeout")))
    patience = _Patience()
    handler = DynamicRendezvousHandler.from_backend(
        params.run_id, store, backend, params.min_nodes, params.max_nodes, params.local_addr, patience
    )
    return Rendezvous(handler, store, host, patience)


def _meet(params: RendezvousParameters, host: str) -> tuple[Any, dist.Store]:
    """Hold the job's store, where its address is one of this machine's, or connect to it."""
    if _is_here(host):
        params.config["is_host"] = True
        try:
            return create_backend(params)
        except RendezvousConnectionError:
            params.config["is_host"] = False  # another launcher on this machine has been first
    try:
        return create_backend(params)
    except RendezvousConnectionError:
        raise RunFailedError(
            f"nobody answers at {params.endpoint}: --rdzv-endpoint has to be an address of one of the nodes, the same "
            "on all of them, and a free port there"
        ) from None


def _is_here(host: str) -> bool:
    """Whether an address of `host` belongs to this machine, be it the one of its hostname or not.

    Raises:
        RunFailedError: there is no such host.
    """
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RunFailedError(f"--rdzv-endpoint: {host}: {error.strerror}") from None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(address)
            except OSError:
                continue
        return True
    return host == socket.gethostname()


def _guard(host: str, port: int, hang_timeout: float) -> None:
    """End this launcher when the store's node stays silent: torch's calls to a machine that is gone do not return."""
    limit = hang_timeout + SILENCE_SECONDS
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)

    def give_up() -> None:
        line = f"no answer for {limit:.0f} s from {host}:{port}, the node that holds the job's store (gone, or cut off)"
        sys.stderr.write(f"megatron-md: {line}: {AGAIN}\n")
        sys.stderr.flush()
        for child in psutil.Process().children(recursive=True):
            child.kill()
        mark = hang_mark()
        if mark is not None:
            shutil.rmtree(mark.parent, ignore_errors=True)
        os._exit(EXIT_ERROR)

    ended = threading.Event()
    thread = threading.Thread(target=_ping, args=(store, limit, give_up, ended), name="store guard", daemon=True)
    thread.start()

    @atexit.register
    def stop() -> None:
        # A thread that returns from C++ into an interpreter that is being taken down aborts the process.
        ended.set()
        thread.join(1.0)


def _ping(store: dist.TCPStore, limit: float, give_up: Callable[[], None], ended: threading.Event) -> None:
    while not ended.wait(PING_SECONDS):
        timer = threading.Timer(limit, give_up)
        timer.daemon = True
        timer.start()
        try:
            store.check([ROUND_VARIABLE])
        except RuntimeError:
            return  # an end that the launcher hears of by itself
        finally:
            timer.cancel()


rendezvous_handler_registry.register(BACKEND, _create)

"""A store that does not answer: its callers go on, and hear it again when it is back."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_md.train.bounded_store import BoundedStore, SilentStoreError


class Link:
    """A way to a port of this machine, which can be held up without being closed: a cable that is pulled out."""

    def __init__(self, port: int) -> None:
        self.open = threading.Event()
        self.open.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._target = port
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", self._target))
        threading.Thread(target=self._carry, args=(far, near), daemon=True).start()
        self._carry(near, far)

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(4096):
            self.open.wait()
            sink.sendall(data)


def test_a_call_that_is_not_answered_ends() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    link = Link(server.port)
    store = BoundedStore(dist.TCPStore("127.0.0.1", link.port, is_master=False, wait_for_workers=False), 1.0)
    store.set("key", "value")
    assert store.get("key") == b"value"

    link.open.clear()
    with pytest.raises(SilentStoreError, match="no answer for 1 s"):
        store.check(["key"])
    began = time.monotonic()
    for _ in range(100):  # while the first call waits, no other one does
        with pytest.raises(SilentStoreError):
            store.check(["key"])
    assert time.monotonic() - began < 30  # not 100 x 1 s

    link.open.set()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            assert store.check(["key"])
            return
        except SilentStoreError:
            time.sleep(0.05)
    raise AssertionError("the store is not heard again")


def test_an_error_of_the_store_is_the_callers() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(dist.DistStoreError):
        BoundedStore(dist.PrefixStore("a", server), 30.0).wait(["nothing"], timedelta(seconds=0.1))

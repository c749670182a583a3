"""A store whose calls end: those of torch wait for ever when the machine that holds the store is silent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch.distributed as dist


class SilentStoreError(RuntimeError):
    """The store has not answered in time; it may do so later."""


class BoundedStore:
    """The calls of a store, each made in a thread of its own and waited for so long only."""

    def __init__(self, store: dist.Store, seconds: float) -> None:
        """Wrap `store`; a call of it is given `seconds`."""
        self._store = store
        self._seconds = seconds
        self._free = threading.Semaphore()
        self._is_silent = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._call(getattr(self._store, name), *arguments)

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """What `method` returns.

        Raises:
            SilentStoreError: nothing within the time; at once, while an earlier call is still not answered.
        """
        answer: Future[Any] = Future()
        if not self._free.acquire(timeout=0 if self._is_silent else self._seconds):
            raise SilentStoreError(f"no answer for {self._seconds:g} s")

        def call() -> None:
            try:
                told = partial(answer.set_result, method(*arguments))
            except Exception as error:
                told = partial(answer.set_exception, error)
            self._is_silent = False
            self._free.release()
            told()

        threading.Thread(target=call, name="store call", daemon=True).start()
        try:
            return answer.result(self._seconds)
        except TimeoutError:
            self._is_silent = True
            raise SilentStoreError(f"no answer for {self._seconds:g} s") from None

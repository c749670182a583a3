"""Work that ranks do for one another: what one finds out all learn, and where one fails all raise its error.

Outside of a job, and in a job of one process, both are plain calls. torch is touched only where a job is running, so
that what can be refused before that needs no import of it.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    result: T | None = None
    error: Exception | None = None


def on_main(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, where alone it is called; every rank calls this.

    Raises:
        Exception: on all ranks, what `work` raised.
    """
    dist = _running()
    if dist is None:
        return work()
    outcome: list[Any] = [_attempt(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome, src=0)
    return _unwrapped(outcome)[0]


def together(work: Callable[[], T]) -> list[T]:
    """What `work` gives on every rank, in order; every rank calls this.

    Raises:
        Exception: on all ranks, what `work` raised on the first rank where it failed.
    """
    dist = _running()
    if dist is None:
        return [work()]
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, _attempt(work))
    return _unwrapped(outcomes)


def place() -> tuple[int, int]:
    """(rank, world size) of this process."""
    dist = _running()
    return (0, 1) if dist is None else (dist.get_rank(), dist.get_world_size())


def _running() -> Any:
    """torch.distributed where a job of several processes is running, else None; never imports it."""
    dist = sys.modules.get("torch.distributed")
    is_running = dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist if is_running else None


def _attempt(work: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome(work())
    except Exception as error:  # the other ranks wait for this one's answer, whatever went wrong
        try:
            if type(pickle.loads(pickle.dumps(error))) is type(error):
                return _Outcome(error=error)
        except Exception:  # it holds what cannot travel
            pass
        return _Outcome(error=RuntimeError(f"{type(error).__name__}: {error}"))


def _unwrapped(outcomes: list[_Outcome[T]]) -> list[T]:
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.result for outcome in outcomes]  # type: ignore[misc]

"""A bar for work that is done tensor by tensor, and that a signal ends between two of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_md.messages import progress


@contextmanager
def stoppable_progress(steps: int, text: str) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal, nothing elsewhere; to be told of every tensor."""
    with _stoppable() as stop_if_asked, progress(text, steps) as move:

        def advance() -> None:
            stop_if_asked()
            move()

        yield advance


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM take effect where the yielded function is called, the second one at once.

    In the midst of a tensor, torch and safetensors would take the interrupt for a fault of their own.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    def stop_if_asked() -> None:
        if asked:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_if_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

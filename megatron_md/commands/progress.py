"""Progress of a command on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_md.messages import tell

LINE_SECONDS = 10.0


@contextmanager
def progress(describe: Callable[[Any], str], total: int | None = None) -> Iterator[Callable[[Any], None]]:
    """A bar on a terminal, else a plain line every ten seconds.

    Args:
        describe: says in words what it is told is done.
        total: what will have been done at the end; None where nobody knows.

    Yields:
        What is to be told how much is done.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.perf_counter()

        def print_line(done: Any) -> None:
            nonlocal last
            if time.perf_counter() - last >= LINE_SECONDS:
                last = time.perf_counter()
                tell(describe(done))

        yield print_line
        return
    endless = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    columns = endless if total is None else Progress.get_default_columns()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda done: bar.update(task, description=describe(done), completed=None if total is None else done)

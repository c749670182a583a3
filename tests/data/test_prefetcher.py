"""Reading ahead: the order, errors in their place, the end of the thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from megatron_md.data.shards import ShardError
from megatron_md.data.stream import Prefetcher


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_prefetcher_keeps_the_order(depth: int) -> None:
    prefetcher = Prefetcher(iter(range(50)), depth=depth)
    assert list(prefetcher) == list(range(50))
    with pytest.raises(StopIteration):
        next(prefetcher)
    prefetcher.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_prefetcher_raises_in_the_right_place(depth: int) -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ShardError("damaged")

    prefetcher = Prefetcher(items(), depth=depth)
    assert [next(prefetcher) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ShardError, match="damaged"):
        next(prefetcher)
    prefetcher.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_closing_a_prefetcher_ends_thread_and_source(depth: int) -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.set()

    threads = threading.active_count()
    prefetcher = Prefetcher(items(), depth=depth)
    assert next(prefetcher) == 0
    prefetcher.close()
    prefetcher.close()
    assert closed.is_set() and threading.active_count() == threads
    with pytest.raises(ValueError, match="closed"):
        next(prefetcher)


def test_prefetcher_reads_no_further_than_its_depth() -> None:
    taken: list[int] = []
    reached = threading.Event()

    def items() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            if number == 4:
                reached.set()
            yield number

    prefetcher = Prefetcher(items(), depth=3)
    next(prefetcher)
    assert reached.wait(10)
    prefetcher.close()
    assert len(taken) == 5

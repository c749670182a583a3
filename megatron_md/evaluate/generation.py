"""Work that data-parallel ranks share: what all that generates does it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_md.parallel import World
from megatron_md.together import together

Job = TypeVar("Job")
Result = TypeVar("Result")


def shared(world: World, jobs: Sequence[Job], work: Callable[[Job], Result]) -> list[Result]:
    """`[work(job) for job in jobs]` on every rank, each data-parallel rank doing its share; every rank calls this.

    The ranks of one share call `work` on the same jobs in the same order.
    """
    mine = {number: work(jobs[number]) for number in range(world.data_rank, len(jobs), world.data_size)}
    found: dict[int, Result] = {}
    for part in together(lambda: mine) if world.data_size > 1 else [mine]:
        found |= part
    return [found[number] for number in range(len(jobs))]

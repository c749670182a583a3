"""Work that data-parallel ranks share: what all that generates does it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from megatron_md.parallel import World

Job = TypeVar("Job")
Result = TypeVar("Result")


def shared(world: World, jobs: Sequence[Job], work: Callable[[Job], Result]) -> list[Result]:
    """`[work(job) for job in jobs]` on every rank, each data-parallel rank doing its share; every rank calls this.

    The ranks of one share call `work` on the same jobs in the same order.
    """
    mine = {number: work(jobs[number]) for number in range(world.data_rank, len(jobs), world.data_size)}
    if world.data_size > 1:
        parts: list[dict[int, Result] | None] = [None] * world.size
        dist.all_gather_object(parts, mine)
        for part in parts:
            mine |= part or {}
    return [mine[number] for number in range(len(jobs))]

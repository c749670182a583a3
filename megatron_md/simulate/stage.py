"""What the simulation of one pipeline stage found, as it travels from the process that made it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

# Parts of a step: once per micro-batch (forward, backward), or once (update: gradient norm, clipping, optimizer).
FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
# What memory holds at its peak, and what FLOPs are spent on.
CATEGORIES = ("weights", "gradients", "optimizer", "activations", "head")
LAYERS, ATTENTION, HEAD, RECOMPUTED = KINDS = ("layers", "attention", "head", "recomputed")


@dataclass(frozen=True)
class Kernel:
    """Calls of one operation that cost the same.

    Attributes:
        part: of the step.
        kind: one of `KINDS`.
        name: torch's name of the operation.
        flops: of one call; a multiply-add counts as two.
        bytes: read and written by one call.
        count: calls per step.
    """

    part: str
    kind: str
    name: str
    flops: int
    bytes: int
    count: int


@dataclass(frozen=True)
class Collective:
    """Calls of one collective on one group.

    Attributes:
        part: of the step.
        name: of the operation.
        group: tensor, data, pipeline, ...
        ranks: global ranks of the group.
        count: calls per step.
        bytes: per step, of the larger of a call's two sides on this rank: what an all-gather ends with, what a
            reduce-scatter starts from, what an all-reduce works on, what is sent.
    """

    part: str
    name: str
    group: str
    ranks: tuple[int, ...]
    count: int
    bytes: int


@dataclass(frozen=True)
class Stage:
    """One rank of a pipeline stage.

    Attributes:
        stage: number of the pipeline stage.
        rank: the global rank that was simulated.
        parameters: on this rank.
        micro_batches: per step.
        built: bytes allocated before the first step.
        peak: most bytes allocated at once.
        memory: what those bytes hold, by `CATEGORIES`; they add up to `peak`.
        kernels: of a step.
        collectives: of a step.
    """

    stage: int
    rank: int
    parameters: int
    micro_batches: int
    built: int
    peak: int
    memory: dict[str, int]
    kernels: list[Kernel]
    collectives: list[Collective]

    def flops(self, kind: str | None = None) -> int:
        """FLOPs of a step, all or of one of `KINDS`."""
        return sum(kernel.flops * kernel.count for kernel in self.kernels if kind in (None, kernel.kind))

    def per_group(self) -> Iterator[tuple[str, str, int, int, int]]:
        """(operation, group, ranks of the group, calls, bytes) of a step, largest first."""
        sums: dict[tuple[str, str, int], list[int]] = {}
        for one in self.collectives:
            entry = sums.setdefault((one.name, one.group, len(one.ranks)), [0, 0])
            entry[0] += one.count
            entry[1] += one.bytes
        for key, (count, size) in sorted(sums.items(), key=lambda item: -item[1][1]):
            yield *key, count, size

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Stage:
        """The reverse of `as_dict`."""
        kernels = [Kernel(**kernel) for kernel in content["kernels"]]
        collectives = [Collective(**{**one, "ranks": tuple(one["ranks"])}) for one in content["collectives"]]
        return cls(**{**content, "kernels": kernels, "collectives": collectives})

"""Tensors that several ranks hold must be the same to the bit: checksums of them, compared.

Held more than once are: every weight, by the data- and context-parallel ranks, and with an optimizer that is not
distributed its state too; what tensor parallelism does not split (norms, learned positions), by the tensor-parallel
ranks; tied embeddings, by the first and the last pipeline stage. With the distributed optimizer the state of the
latter two is compared as well: a checksum of a whole is the sum of those of its parts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_md.checkpoint.state import named_parameters, optimizer_slices
from megatron_md.errors import RunFailedError
from megatron_md.model.build import settled_parameters
from megatron_md.together import together

NAMED = 3
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COLUMNS = 256  # of the table whose rows and columns are summed up
_MULTIPLIERS = {"exp_avg": 3, "exp_avg_sq": 5, "fp32_param": 7, "ema": 9}  # odd, so that no difference can vanish


class ReplicaError(RunFailedError):
    """Ranks that should hold the same tensor do not; raised on all ranks at once."""


def checksum(values: torch.Tensor, start: int = 0) -> torch.Tensor:
    """sum_j (2 j + 1) x_j mod 2^64 over the 8-byte words x_j of a tensor of which `values` begins at element `start`.

    The weights are odd, so that one word that differs always shows. The checksums of the parts of a tensor add up to
    that of the whole.

    Returns:
        int64 scalar on the tensor's device.
    """
    per_word = 8 // values.element_size()
    bits = values.detach().reshape(-1).view(_BITS[values.element_size()])
    before = start % per_word
    after = -(before + bits.numel()) % (per_word * _COLUMNS)
    if before or after or bits.storage_offset() % per_word:
        bits = F.pad(bits, (before, after))
    table = bits.view(torch.int64).view(-1, _COLUMNS)
    first_words = start // per_word + _COLUMNS * torch.arange(len(table), device=table.device)
    columns = torch.arange(_COLUMNS, device=table.device)
    return (table.sum(1) * 2 * first_words).sum() + (table.sum(0) * (2 * columns + 1)).sum()


@dataclass(frozen=True)
class _Held:
    """One of this rank's parameters.

    Attributes:
        name: in the whole model.
        is_whole: tensor parallelism does not split it.
        is_tied: first and last pipeline stage hold it.
    """

    name: str
    is_whole: bool
    is_tied: bool


@torch.no_grad()
def _checksums(chunks: list[Any], optimizer: MegatronOptimizer) -> tuple[list[_Held], torch.Tensor]:
    """What this rank holds, and int64 [2, P]: checksums of its weights and of what it has of their optimizer state.

    They are 0 for what no other rank holds.
    """
    data, tensor = _data_group().size(), parallel_state.get_tensor_model_parallel_world_size()
    is_distributed = _is_distributed(optimizer)
    parameters = list(named_parameters(chunks))
    held = [
        _Held(name, not getattr(p, "tensor_model_parallel", False), bool(getattr(p, "shared_embedding", False)))
        for name, p in parameters
    ]
    is_common = [(item.is_whole and tensor > 1) or item.is_tied for item in held]
    zero = torch.zeros((), dtype=torch.int64, device=parameters[0][1].device)
    weights = [
        checksum(p) if common or data > 1 else zero for (_, p), common in zip(parameters, is_common, strict=True)
    ]
    states = [zero] * len(held)
    index = {id(p): number for number, (_, p) in enumerate(parameters)}
    for piece in optimizer_slices(optimizer):
        number = index[id(piece.parameter)]
        if is_common[number] or (data > 1 and not is_distributed):
            for name, values in piece.tensors.items():
                states[number] = states[number] + _MULTIPLIERS.get(name, 1) * checksum(values, piece.start)
    return held, torch.stack([torch.stack(weights), torch.stack(states)])


def compare(chunks: list[Any], optimizer: MegatronOptimizer, step: int) -> None:
    """Compare what several ranks hold; every rank calls this at the same step.

    Raises:
        ReplicaError: names tensors that differ, and the ranks.
    """
    if dist.get_world_size() == 1:
        return
    with settled_parameters(chunks):
        held, sums_2P = _checksums(chunks, optimizer)
    data = _data_group()
    if _is_distributed(optimizer):
        dist.all_reduce(sums_2P[1], group=data)
    whole = [number for number, item in enumerate(held) if item.is_whole]
    tied = [number for number, item in enumerate(held) if item.is_tied]
    differs = _differs(sums_2P, data) + _differs(sums_2P[:, whole], parallel_state.get_tensor_model_parallel_group())
    if tied:
        differs += _differs(sums_2P[:, tied], parallel_state.get_embedding_group())
    dist.all_reduce(differs)
    if differs.item():
        raise ReplicaError(_report(held, sums_2P, step))


def _data_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _is_distributed(optimizer: MegatronOptimizer) -> bool:
    return any(isinstance(part, DistributedOptimizer) for part in optimizer.chained_optimizers)


def _differs(sums: torch.Tensor, group: Any) -> torch.Tensor:
    """int64 scalar: whether any of these is not the same on all ranks of a group."""
    # max(~x) is ~min(x), so that one reduction gives both ends.
    ends = torch.stack((sums, ~sums))
    if group.size() > 1 and sums.numel():
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    return (ends[0] != ~ends[1]).any().long()


def _report(held: list[_Held], sums_2P: torch.Tensor, step: int) -> str:
    """Which tensors differ, and how the ranks fall apart over each; every rank calls this."""
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    table: dict[tuple[str, int | None], int] = {}
    for number, item in enumerate(held):
        part = None if item.is_whole else tensor_rank
        table[item.name, part], table[f"optimizer state of {item.name}", part] = sums_2P[:, number].tolist()
    ranks_by_sum: dict[tuple[str, int | None], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, there in enumerate(together(lambda: table)):
        for key, value in there.items():
            ranks_by_sum[key][value].append(rank)
    found = [_divided(name, sums) for (name, _), sums in ranks_by_sum.items() if len(sums) > 1]
    found.sort(key=lambda line: line.startswith("optimizer"))
    more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return (
        f"replicas differ after step {step}: {'; '.join(found[:NAMED])}{more}: a device or its memory is at fault, or "
        "code that changes some ranks only. Nothing was saved at this step; the same command goes on from the newest "
        "checkpoint"
    )


def _divided(name: str, ranks_by_sum: dict[int, list[int]]) -> str:
    *few, most = sorted(ranks_by_sum.values(), key=lambda ranks: (len(ranks), -ranks[0]))
    return f"{name} on {' and on '.join(map(_ranks, few))} is not what it is on {_ranks(most)}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

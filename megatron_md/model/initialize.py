"""Initial weights as a pure function of (seed, global parameter name, element index).

megatron-core draws each rank's shard from that rank's generator, so another tensor- or pipeline-parallel layout
starts from another function. Here every shard is a slice of the same full tensor, whatever the layout, and whatever
the vocabulary is padded to (padding only appends rows, of zeros).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_md.config.lora import is_adapter, is_first_factor

_VOCABULARY_TABLES = ("word_embeddings.weight", "output_layer.weight")
_BLOCK = 1 << 20  # elements drawn at a time: keeps the float64 temporaries small


def normal_rows(seed: int, name: str, first_row: int, rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Rows of an unbounded table of standard normal numbers that belongs to (seed, name).

    A row's numbers depend on its number and its length only: numpy's counter-based Philox generator starts at
    the row's own counter, and two uniforms give two normals (Box and Muller 1958).

    Returns:
        float64 [rows, columns].
    """
    key = np.frombuffer(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], dtype=np.uint64)
    padded = -(-columns // 4) * 4  # one counter value gives four 64-bit words
    counter = np.array([first_row * (padded // 4), 0, 0, 0], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(rows * padded)
    words >>= np.uint64(11)
    # In place where it can be: a table of 8B parameters is bound by memory.
    pairs = words.astype(np.float64).reshape(-1, 2)
    pairs += 0.5
    pairs *= 2.0**-53
    radius = np.log(pairs[:, 0])
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle = 2.0 * math.pi * pairs[:, 1]
    np.multiply(radius, np.cos(angle), out=pairs[:, 0])
    np.multiply(radius, np.sin(angle), out=pairs[:, 1])
    return pairs.reshape(rows, padded)[:, :columns]


def sharded_tensors(state_dict: Any) -> list[ShardedTensor]:
    """All tensors of a sharded state dict, with fused ones (gate and up) taken apart."""
    found: list[ShardedTensor] = []
    for value in nested_values(state_dict):
        if isinstance(value, ShardedTensorFactory):
            found += sharded_tensors({"built": value.build()})
        elif isinstance(value, ShardedTensor):
            found.append(value)
    return found


def _fill(shard: ShardedTensor, seed: int, std: float, pool: Executor) -> None:
    """Fill one shard's data, a [rows, columns] slice of a [.., rows, columns] tensor, in blocks of rows."""
    axes = shard.prepend_axis_num
    *leading, rows_total, columns_total = shard.global_shape
    *leading_offset, row_offset, column_offset = shard.global_offset
    assert len(leading) == axes, f"{shard.key}: weights to initialise are matrices"
    # Rows of a stacked tensor are numbered layer by layer; a vocabulary's padding only appends rows.
    layer = 0
    for size, offset in zip(leading, leading_offset, strict=True):
        layer = layer * size + offset
    rows, columns = shard.data.shape
    step = max(1, _BLOCK // columns_total)

    def fill(start: int) -> None:
        count = min(step, rows - start)
        table = normal_rows(seed, shard.key, layer * rows_total + row_offset + start, count, columns_total)
        values = table[:, column_offset : column_offset + columns] * std
        with torch.no_grad():  # a setting of each thread
            shard.data[start : start + count].copy_(torch.from_numpy(values))

    list(pool.map(fill, range(0, rows, step)))


@torch.no_grad()
def initialize_weights(
    chunks: Sequence[Any],
    *,
    seed: int,
    std: float,
    output_std: float,
    vocab: int,
    metadata: dict[str, Any],
    is_drawn: Callable[[str], bool] = lambda name: True,
) -> None:
    """Fill every matrix of the model with normal numbers, norms with 1, biases and the vocabulary's padding with 0.

    Of an adapter, A has the variance of PEFT's uniform numbers, 1 / (3 in), and B is 0: it changes nothing yet.

    Args:
        chunks: this rank's model chunks.
        seed: of the run.
        std: standard deviation of the weights.
        output_std: of the projections that write into the residual stream (`linear_proj`, `linear_fc2`).
        vocab: tokens of the vocabulary without its padding.
        metadata: megatron-core's sharded-state-dict metadata.
        is_drawn: by its name, whether a parameter is filled at all.
    """
    # numpy lets go of the interpreter lock; the cores of a node are shared out among its ranks.
    threads = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    replicas = metadata["dp_cp_group"]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if parameter.dim() < 2 and is_drawn(name):
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            shards = sharded_tensors(chunk.sharded_state_dict(metadata=metadata))
            matrices = [
                shard for shard in shards if shard.data is not None and shard.data.dim() >= 2 and is_drawn(shard.key)
            ]
            owners = _shared_out([shard.data.numel() for shard in matrices], replicas.size())
            for shard, owner in zip(matrices, owners, strict=True):
                if owner != replicas.rank():
                    continue
                into_residual = shard.key.endswith(("linear_proj.weight", "linear_fc2.weight"))
                if not is_adapter(shard.key):
                    _fill(shard, seed, output_std if into_residual else std, pool)
                elif is_first_factor(shard.key):
                    _fill(shard, seed, (3.0 * shard.global_shape[-1]) ** -0.5, pool)
                else:
                    shard.data.zero_()
                if shard.key.endswith(_VOCABULARY_TABLES):
                    # Padding differs between layouts; zeros that never get a gradient leave the weights' norm alone.
                    shard.data[max(0, vocab - shard.global_offset[-2]) :].zero_()
            for shard, owner in zip(matrices, owners, strict=True):
                if replicas.size() > 1:
                    dist.broadcast(shard.data, group_src=owner, group=replicas)


def _shared_out(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which of the ranks that hold the same weights draws each of them: the one with the least to draw so far."""
    drawn = [0] * ranks
    owners = []
    for size in sizes:
        owner = drawn.index(min(drawn))
        drawn[owner] += size
        owners.append(owner)
    return owners

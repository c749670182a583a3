"""Which layouts of a run are worth simulating: those that fit by closed forms, the most promising first."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Literal

from megatron_md.config import Config, ConfigError, ResolvedConfig
from megatron_md.run.check import Layout, check_config, resolve_config
from megatron_md.run.estimate import memory_per_rank, training_flops_per_token
from megatron_md.simulate.children import Run
from megatron_md.simulate.hardware import Hardware
from megatron_md.simulate.roofline import Assumptions

Recompute = Literal["none", "full"]
_RECOMPUTE: tuple[Recompute, ...] = ("none", "full")
_TENSOR, _PIPELINE, _MICRO_BATCH = (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8)

# The closed forms are right within this share (tests/simulate/test_step.py).
_TOLERANCE = 0.03


def candidates(config: Config, world_size: int, hardware: Hardware, *, trust: bool = False) -> list[Run]:
    """Layouts that fit into the device by closed forms, the fastest by a rough guess first.

    Tensor-parallel ranks stay within a node, with sequence parallelism; pipelines are not interleaved; activations
    are recomputed where they would not fit.

    Raises:
        ConfigError: the config is wrong under every layout.
    """
    found, refusals, tried = [], [], 0
    room = (hardware.memory_bytes - Assumptions().reserve_bytes) * (1.0 + _TOLERANCE)
    for tensor, pipeline, micro_batch in product(_TENSOR, _PIPELINE, _MICRO_BATCH):
        if tensor > hardware.devices_per_node:
            continue
        tried += 1
        for recompute in _RECOMPUTE:
            changed = _with(config, tensor, pipeline, micro_batch, recompute)
            try:
                layout = check_config(changed, world_size, corpora=False, trust=trust)
                resolved = resolve_config(changed)
            except ConfigError as error:
                refusals.append(error)
                break
            if memory_per_rank(resolved, layout).total <= room:
                found.append((resolved, layout))
                break
    if len(refusals) == tried:
        raise refusals[0]
    return sorted(found, key=lambda run: _guess(run[0], run[1], hardware))


def _with(config: Config, tensor: int, pipeline: int, micro_batch: int, recompute: Recompute) -> Config:
    return replace(
        config,
        parallel=replace(
            config.parallel,
            tensor=tensor,
            sequence_parallel=tensor > 1,
            pipeline=pipeline,
            virtual_pipeline=1,
            first_stage_layers=None,
            last_stage_layers=None,
        ),
        train=replace(config.train, micro_batch_size=micro_batch, recompute=recompute),
    )


def _guess(config: ResolvedConfig, layout: Layout, hardware: Hardware) -> float:
    """Seconds a token on one device: FLOPs at the peak, what tensor parallelism moves, the bubble."""
    model = config.model
    flops = training_flops_per_token(config, model.vocab, recomputation=True) / layout.tensor / hardware.peak_flops
    # Each layer gathers and scatters twice forward and three times backward.
    moved = 10 * 2 * model.hidden * model.layers * (1 - 1 / layout.tensor) / hardware.link_bandwidth
    return (flops + moved) * layout.tensor * (1 + (layout.pipeline - 1) / layout.micro_batches)

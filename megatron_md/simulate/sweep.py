"""Which layouts of a run are worth simulating: those that fit by closed forms, the most promising first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from megatron_md.config import Config, ConfigError
from megatron_md.run.check import Layout, check_config, resolve_config
from megatron_md.run.estimate import memory_per_rank, training_flops_per_token
from megatron_md.simulate.children import Run
from megatron_md.simulate.hardware import Hardware
from megatron_md.simulate.roofline import Assumptions

# The closed forms are right within this share (tests/run/test_estimate.py).
_TOLERANCE = 0.03


def candidates(config: Config, world_size: int, hardware: Hardware, *, trust: bool = False) -> list[Run]:
    """Layouts that fit into the device by closed forms, the fastest by a rough guess first.

    Tensor-parallel ranks stay within a node, with sequence parallelism; pipelines are not interleaved; activations
    are recomputed where they would not fit.

    Raises:
        ConfigError: the config is wrong under every layout.
    """
    found, refusals = [], []
    room = (hardware.memory_bytes - Assumptions().reserve_bytes) * (1.0 + _TOLERANCE)
    for tensor, pipeline, micro_batch in product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8)):
        if tensor > hardware.devices_per_node:
            continue
        for recompute in ("none", "full"):
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
    if not found and len(refusals) == 4 * 5 * 4:
        raise refusals[0]
    return sorted(found, key=lambda run: _guess(*run, hardware))


def _with(config: Config, tensor: int, pipeline: int, micro_batch: int, recompute: str) -> Config:
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


def _guess(config: Config, layout: Layout, hardware: Hardware) -> float:
    """Seconds a token on one device: FLOPs at the peak, what tensor parallelism moves, the bubble."""
    model = config.model
    assert model.vocab is not None
    flops = training_flops_per_token(config, model.vocab, recomputation=True) / layout.tensor / hardware.peak_flops
    # Each layer gathers and scatters twice forward and three times backward.
    moved = 10 * 2 * model.hidden * model.layers * (1 - 1 / layout.tensor) / hardware.link_bandwidth
    return (flops + moved) * layout.tensor * (1 + (layout.pipeline - 1) / layout.micro_batches)


def layouts(runs: list[Run]) -> Iterator[str]:
    """What distinguishes each run."""
    for config, layout in runs:
        yield f"tensor {layout.tensor} x pipeline {layout.pipeline}, {config.train.micro_batch_size} rows"

"""Stages and devices with round numbers."""

from __future__ import annotations

from typing import Any

from megatron_md.config import ResolvedConfig, config_from_mapping, resolve
from megatron_md.run.check import Layout, check_config
from megatron_md.simulate.hardware import Hardware
from megatron_md.simulate.roofline import Assumptions
from megatron_md.simulate.stage import Collective, Kernel, Stage

DEVICE = Hardware(
    name="round",
    peak_flops=1e12,
    peak_flops_fp32=1e11,
    memory_bytes=1e9,
    memory_bandwidth=1e10,
    link_bandwidth=1e9,
    network_bandwidth=1e8,
    devices_per_node=4,
)
IDEAL = Assumptions(
    matmul=1.0, attention=1.0, memory=1.0, links=1.0, kernel_seconds=0.0, collective_seconds=0.0, reserve_bytes=0.0
)


def kernel(part: str, flops: float = 0, size: float = 0, *, count: int = 1, name: str = "aten::mm") -> Kernel:
    return Kernel(part, "layers", name, int(flops), int(size), count)


def collective(
    part: str, name: str, group: str, ranks: int, size: float, *, count: int = 1, apart: int = 1
) -> Collective:
    return Collective(part, name, group, tuple(range(0, ranks * apart, apart)), count, int(size))


def stage(kernels: list[Kernel], collectives: list[Collective] | None = None, *, number: int = 0, **keys: Any) -> Stage:
    memory = {"weights": 100, "gradients": 200, "optimizer": 300, "activations": 40, "head": 5}
    values: dict[str, Any] = {"parameters": 50, "micro_batches": 1, "built": 600, "peak": 645, "memory": memory, **keys}
    return Stage(stage=number, rank=number, kernels=kernels, collectives=collectives or [], **values)


def run(world: int = 1, **sections: Any) -> tuple[ResolvedConfig, Layout]:
    """A tiny bf16 run with one micro-batch a rank."""
    train = {
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "precision": "bf16",
        "steps": 10,
        **sections.pop("train", {}),
    }
    content = {"model": {"preset": "tiny", "vocab": 512}, "train": train, **sections}
    config = resolve(config_from_mapping(content))
    return config, check_config(config, world, corpora=False)

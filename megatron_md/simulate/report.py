"""What `megatron-md simulate` prints, and what it writes as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_md.config import ResolvedConfig
from megatron_md.run.check import Layout
from megatron_md.run.estimate import memory_per_rank, predicted_fraction
from megatron_md.simulate.hardware import Hardware
from megatron_md.simulate.roofline import Assumptions, Forecast
from megatron_md.simulate.stage import CATEGORIES, KINDS, Stage

GIB, MIB = 2**30, 2**20


def report(config: ResolvedConfig, layout: Layout, stages: Sequence[Stage], hardware: Hardware, found: Forecast) -> str:
    """All figures of one layout."""
    lines = [
        f"# {layout.world} x {hardware.name}: tensor {layout.tensor} x pipeline {layout.pipeline} x context "
        f"{layout.context} x data {layout.data}, {layout.micro_batches} micro-batches of "
        f"{config.train.micro_batch_size} rows x {config.data.seq_length:,} tokens, {config.train.precision}, "
        f"recompute {config.train.recompute}"
    ]
    for stage in stages:
        lines += ["", *_stage_lines(stage, layout)]
    lines += ["", f"# step on {hardware.name} (roofline)", *_step_lines(config, layout, hardware, found)]
    lines += ["", "# assumed", *(f"  {line}" for line in assumed(config, hardware, Assumptions()))]
    return "\n".join(lines)


def _stage_lines(stage: Stage, layout: Layout) -> Iterator[str]:
    yield f"# pipeline stage {stage.stage} of {layout.pipeline} (rank {stage.rank}): {stage.parameters:,} parameters"
    unit, name = (GIB, "GiB") if stage.peak >= GIB else (MIB, "MiB")
    parts = ", ".join(f"{part} {stage.memory[part] / unit:.2f}" for part in CATEGORIES)
    before = f"{stage.built / unit:.2f} before the first step"
    yield f"  memory       peak {stage.peak / unit:.2f} {name} = {parts}; {before}"
    kinds = ", ".join(f"{kind} {stage.flops(kind):.3e}" for kind in KINDS if stage.flops(kind))
    yield f"  FLOPs        {stage.flops():.4e} a step = {kinds}"
    yield f"  kernels      {sum(kernel.count for kernel in stage.kernels):,} a step"
    for name, group, size, count, moved in stage.per_group():
        if size > 1:
            yield f"  {_short(name):<12} {group} ({size} ranks): {count:,} calls, {moved / MIB:,.2f} MiB a step"


def _short(name: str) -> str:
    """A collective's usual name for torch's name of the operation."""
    usual = {"allgather": "all-gather", "reduce_scatter": "reduce-scat.", "allreduce": "all-reduce"}
    usual["alltoall"] = "all-to-all"
    return next((short for part, short in usual.items() if part in name), name)


def _step_lines(config: ResolvedConfig, layout: Layout, hardware: Hardware, found: Forecast) -> Iterator[str]:
    step = found.step
    parts = ("compute", "tensor", "pipeline", "bubble", "data", "update")
    shares = ", ".join(f"{part} {1e3 * getattr(step, part):.1f}" for part in parts if getattr(step, part) > 5e-5)
    room = hardware.memory_bytes / GIB
    reserve = Assumptions().reserve_bytes / GIB
    verdict = "fits" if found.fits else "DOES NOT FIT"
    estimate = memory_per_rank(config, layout).total / GIB
    fullest = f"{found.peak / GIB:.2f} GiB on the fullest rank"
    yield f"  memory       {fullest}, {reserve:.0f} GiB kept free: {verdict} in {room:.1f} GiB"
    yield f"  --dry-run    estimates {estimate:.2f} GiB by closed forms"
    yield f"  time         {1e3 * step.total:.1f} ms a step = {shares}"
    yield f"  tokens/s     {found.tokens_per_second:,.0f}, {found.tokens_per_second / layout.world:,.0f} a device"
    yield f"  utilisation  MFU {found.mfu:.1%}; {found.executed:.1%} with all FLOPs that are executed"
    yield f"  run          {found.days:,.2f} days, {_hours(found.gpu_hours)} GPU-hours for {config.train.steps:,} steps"


def assumed(config: ResolvedConfig, hardware: Hardware, values: Assumptions) -> list[str]:
    """What the figures take for given."""
    lines = [
        "our local layers with torch's flash attention and fused RMSNorm and megatron-core's fused SwiGLU, as without "
        "Transformer Engine",
        f"every row masked at the mean rate {predicted_fraction(config):.3g}; memory at the highest rate, where that "
        "is over 1.1 times the mean",
        "memory is what tensors take of torch's allocator: no fragmentation, no CUDA context, no NCCL, no workspaces",
        f"matrix products reach {values.matmul:.0%} of the peak, attention {values.attention:.0%}, other kernels "
        f"{values.memory:.0%} of the memory bandwidth, collectives {values.links:.0%} of the links",
        f"a kernel takes at least {1e6 * values.kernel_seconds:.0f} us, a collective "
        f"{1e6 * values.collective_seconds:.0f} us besides its bytes",
        "collectives of tensor and context parallelism and what stages send are waited for; those of data parallelism "
        "are hidden by one micro-batch where parallel.overlap_grad_reduce and parallel.overlap_param_gather say so",
        f"ranks fill nodes of {hardware.devices_per_node}; the peak is "
        f"{hardware.peak(config.train.precision) / 1e12:,.0f} TFLOP/s",
        "no data loading, validation, saving, faults; full batch from the first step",
    ]
    if config.data.document_attention == "within_document":
        lines.append("attention over whole rows, though data.document_attention keeps documents apart")
    if config.objective.block_stages:
        lines.append("attention in blocks as a flash kernel over as many pairs as FlexAttention's tiles of 128 hold")
    if config.objective.attention_annealing:
        lines.append("attention without hidden pairs, as after objective.attention_annealing")
    return lines


def as_json(
    config: ResolvedConfig, layout: Layout, stages: Sequence[Stage], hardware: Hardware, found: Forecast
) -> dict[str, Any]:
    """The same for machines."""
    return {
        "layout": asdict(layout),
        "micro_batch_size": config.train.micro_batch_size,
        "recompute": config.train.recompute,
        "hardware": asdict(hardware),
        "stages": [
            {
                **{key: value for key, value in stage.as_dict().items() if key != "kernels"},
                "flops": {"total": stage.flops(), **{kind: stage.flops(kind) for kind in KINDS}},
            }
            for stage in stages
        ],
        "forecast": {**asdict(found), "step": found.step.as_dict()},
        "dry_run_bytes": memory_per_rank(config, layout).total,
        "assumed": {**asdict(Assumptions()), "notes": assumed(config, hardware, Assumptions())},
    }


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10.0 else f"{hours:.2f}"


def table(rows: Sequence[tuple[ResolvedConfig, Layout, Forecast]]) -> str:
    """Layouts of a sweep, best first."""
    head = (
        "tensor pipeline data micro_batch recompute  peak GiB  fits  step ms    MFU  tokens/s/device    days  GPU-hours"
    )
    lines = [head]
    for config, layout, found in sorted(rows, key=lambda row: (not row[2].fits, row[2].step.total)):
        lines.append(
            f"{layout.tensor:>6} {layout.pipeline:>8} {layout.data:>4} {config.train.micro_batch_size:>11} "
            f"{config.train.recompute:>9} {found.peak / GIB:>9.2f} {'yes' if found.fits else 'no':>5} "
            f"{1e3 * found.step.total:>8.1f} {found.mfu:>6.1%} {found.tokens_per_second / layout.world:>16,.0f} "
            f"{found.days:>7.2f} {_hours(found.gpu_hours):>10}"
        )
    return "\n".join(lines)

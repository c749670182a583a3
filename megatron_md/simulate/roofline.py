"""From the kernels and collectives of a step to its time: a roofline with few, stated assumptions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

from megatron_md.config import ResolvedConfig
from megatron_md.run.check import Layout
from megatron_md.run.estimate import training_flops_per_token
from megatron_md.simulate.hardware import Hardware
from megatron_md.simulate.stage import BACKWARD, FORWARD, UPDATE, Collective, Kernel, Stage
from megatron_md.train.progress import Progress


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says. None of it was fitted to a measured step.

    Attributes:
        matmul: share of the peak that matrix products reach.
        attention: share of the peak that the attention kernel reaches; FlashAttention-2 on H100: 0.35 (Shah et al.,
            FlashAttention-3, arXiv 2407.08608).
        memory: share of the memory bandwidth that other kernels reach.
        links: share of the links' bandwidth that collectives reach.
        kernel_seconds: least time of a kernel, which the host takes to launch it.
        collective_seconds: time of a collective besides its bytes.
        reserve_bytes: memory for the CUDA context, NCCL, workspaces and fragmentation.
    """

    matmul: float = 0.7
    attention: float = 0.35
    memory: float = 0.8
    links: float = 0.75
    kernel_seconds: float = 5e-6
    collective_seconds: float = 15e-6
    reserve_bytes: float = 5 * 2**30


@dataclass(frozen=True)
class StepTime:
    """Where a step's time goes, in seconds on the critical path.

    Attributes:
        compute: kernels of the slowest stage, over all micro-batches.
        tensor: collectives of tensor and context parallelism, which the layers wait for.
        pipeline: what stages send each other.
        bubble: the pipeline's filling and draining.
        data: gradient reduction and parameter gathering that nothing hides.
        update: gradient norm, clipping, optimizer, and what else comes once a step.
    """

    compute: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    update: float

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(getattr(self, field.name) for field in fields(self))

    def as_dict(self) -> dict[str, float]:
        """As JSON has it."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take.

    Attributes:
        step: where the time of a step goes.
        tokens_per_second: of the whole job.
        mfu: model FLOPs utilisation: FLOPs without recomputation, as training logs it.
        executed: the same of all FLOPs that the ranks execute.
        flops: executed by all ranks in a step.
        days: of the whole run, without validation, saving and faults.
        gpu_hours: days x 24 x ranks.
        peak: most bytes on any rank.
        fits: they and the reserve fit into the device.
    """

    step: StepTime
    tokens_per_second: float
    mfu: float
    executed: float
    flops: float
    days: float
    gpu_hours: float
    peak: int
    fits: bool


class Roofline:
    """Times of kernels and collectives on one kind of device."""

    def __init__(self, hardware: Hardware, precision: str, assumptions: Assumptions) -> None:
        self.hardware, self.assumptions = hardware, assumptions
        self.peak = hardware.peak(precision)

    def kernels(self, kernels: Iterable[Kernel]) -> float:
        """Seconds of kernels that run one after the other."""
        return sum(self._kernel(kernel) * kernel.count for kernel in kernels)

    def _kernel(self, kernel: Kernel) -> float:
        device, assumed = self.hardware, self.assumptions
        share = assumed.attention if "attention" in kernel.name else assumed.matmul
        return max(
            kernel.flops / (self.peak * share),
            kernel.bytes / (device.memory_bandwidth * assumed.memory),
            assumed.kernel_seconds,
        )

    def collectives(self, collectives: Iterable[Collective]) -> float:
        """Seconds of collectives that run one after the other."""
        return sum(map(self.collective, collectives))

    def collective(self, one: Collective) -> float:
        """Seconds of all calls: the bytes over the slower of links and network, and a latency for each call.

        A ring over n ranks sends (n - 1) / n of the bytes of a gather or scatter, twice that of an all-reduce. What
        enters a node comes through the network ports of the ranks that it has in the group.
        """
        ranks, device = one.ranks, self.hardware
        if len(ranks) < 2:
            return 0.0
        nodes: dict[int, int] = {}
        for rank in ranks:
            nodes[rank // device.devices_per_node] = nodes.get(rank // device.devices_per_node, 0) + 1
        per_node = max(nodes.values())
        if one.name in ("send", "recv", "broadcast"):
            within = across = float(one.bytes)
        else:
            factor = 2.0 if one.name.startswith("allreduce") else 1.0
            within = factor * one.bytes * (1.0 - 1.0 / len(ranks))
            across = factor * one.bytes * (1.0 - 1.0 / len(nodes)) / per_node
        seconds = within / (device.link_bandwidth * self.assumptions.links) if per_node > 1 else 0.0
        if len(nodes) > 1:
            seconds = max(seconds, across / (device.network_bandwidth * self.assumptions.links))
        return seconds + one.count * self.assumptions.collective_seconds


def step_time(stages: Sequence[Stage], config: ResolvedConfig, layout: Layout, roofline: Roofline) -> StepTime:
    """The time of a step: the slowest stage on all micro-batches, the bubble, then what nothing overlaps."""
    slowest = max((_stage_time(stage, config, roofline) for stage in stages), key=lambda time: time.total)
    on_batches = slowest.compute + slowest.tensor + slowest.pipeline
    # Narayanan et al., arXiv 2104.04473: (P - 1) / (M V) of the time on the micro-batches.
    share = (layout.pipeline - 1) / (layout.micro_batches * config.parallel.virtual_pipeline)
    return StepTime(slowest.compute, slowest.tensor, slowest.pipeline, share * on_batches, slowest.data, slowest.update)


def _stage_time(stage: Stage, config: ResolvedConfig, roofline: Roofline) -> StepTime:
    seconds = {
        part: roofline.kernels(kernel for kernel in stage.kernels if kernel.part == part)
        for part in (FORWARD, BACKWARD, UPDATE)
    }
    by_group: dict[str, list[Collective]] = {}
    for one in stage.collectives:
        by_group.setdefault(one.group if one.part != UPDATE else UPDATE, []).append(one)
    sent = [
        roofline.collectives(one for one in by_group.get("pipeline", ()) if one.name == name)
        for name in ("send", "recv")
    ]
    data = 0.0
    for one in stage.collectives:
        if not one.group.startswith("data") or one.part == UPDATE:
            continue
        is_gather = one.name.startswith("allgather")
        part = FORWARD if is_gather else BACKWARD
        reduce_overlaps, gather_overlaps = config.parallel.overlaps(by_default=True)
        overlaps = gather_overlaps if is_gather else reduce_overlaps
        whole = roofline.collective(one)
        # One micro-batch hides it, but for the bucket at its end.
        hidden = seconds[part] / stage.micro_batches if overlaps else 0.0
        data += max(whole - hidden, whole / one.count)
    named = ("tensor", "context", "pipeline", "data")
    rest = [one for group, ones in by_group.items() if not group.startswith(named) for one in ones]
    return StepTime(
        compute=seconds[FORWARD] + seconds[BACKWARD],
        tensor=roofline.collectives([*by_group.get("tensor", ()), *by_group.get("context", ())]),
        pipeline=max(sent),
        bubble=0.0,
        data=data,
        update=seconds[UPDATE] + roofline.collectives(rest),
    )


def forecast(
    stages: Sequence[Stage],
    config: ResolvedConfig,
    layout: Layout,
    hardware: Hardware,
    assumptions: Assumptions | None = None,
) -> Forecast:
    """What the run takes, from the simulation of its first, middle and last pipeline stage."""
    assumed = assumptions or Assumptions()
    time = step_time(stages, config, layout, Roofline(hardware, config.train.precision, assumed))
    tokens = config.train.global_batch_size * config.data.seq_length
    per_second = tokens / time.total
    peak_of_all = hardware.peak(config.train.precision) * layout.world
    # Stages between the first and the last are alike.
    copies = [1 if stage.stage in (0, layout.pipeline - 1) else layout.pipeline - 2 for stage in stages]
    of_replica = sum(stage.flops() * count for stage, count in zip(stages, copies, strict=True))
    flops = of_replica * layout.world / layout.pipeline
    seconds = Progress.start(config).total_tokens / per_second
    peak = max(stage.peak for stage in stages)
    return Forecast(
        step=time,
        tokens_per_second=per_second,
        mfu=training_flops_per_token(config, config.model.vocab) * per_second / peak_of_all,
        executed=flops / time.total / peak_of_all,
        flops=flops,
        days=seconds / 86400.0,
        gpu_hours=seconds / 3600.0 * layout.world,
        peak=peak,
        fits=peak + assumed.reserve_bytes <= hardware.memory_bytes,
    )

"""Process groups, device and seeds: the one place that starts and ends distributed work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_md import cuda
from megatron_md.config import Config
from megatron_md.errors import UserError
from megatron_md.together import together

Job = TypeVar("Job")
Result = TypeVar("Result")

# How often the job's workers have been started before these, as `megatron-md train` tells them.
ROUND_VARIABLE = "MEGATRON_MD_ROUND"


def restarts() -> int:
    """How often all workers of the job have been started anew; the same number on every rank.

    Under torchrun it is the count of this node's launcher, which does not count when another node began it.
    """
    return int(os.environ.get(ROUND_VARIABLE, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


@dataclass(frozen=True)
class World:
    """This process's place in the job.

    Attributes:
        rank: global rank.
        size: number of processes.
        device: where this process computes.
        data_rank: which share of the rows this process has a part in; context-parallel ranks have the same.
        data_size: number of shares.
        is_last_stage: this process holds the end of the pipeline, where losses arise.
    """

    rank: int
    size: int
    device: torch.device
    data_rank: int
    data_size: int
    is_last_stage: bool

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0


def select_device(name: str) -> torch.device:
    """Device for `train.device`: auto takes this process's CUDA device where there is one.

    Raises:
        UserError: cuda is asked for and there is none, or there are more processes on this node than devices.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch sees no CUDA device: use train.device=auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count > 1:
        raise UserError(f"this node has {count} CUDA devices and more processes than that: start one per device")
    # A scheduler may show each process its own device only.
    return torch.device("cuda", local_rank if count > 1 else 0)


# Dense bf16 peak of one device in FLOP/s, from the makers' data sheets.
_PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s that an MFU is measured against; None where it is not known (CPU, fp32, other devices)."""
    if device.type != "cuda" or precision not in ("bf16", "fp8"):
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for key, peak in _PEAK_BF16.items() if key in name), None)
    return 2.0 * peak if peak is not None and precision == "fp8" else peak


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    # Bound to its device, NCCL connects at once, not within the first steps, and splits groups off without a new start.
    # One process alone would hold gigabytes for groups of one that way.
    is_bound = device.type == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1
    keys: dict[str, Any] = {"timeout": timeout, "device_id": device if is_bound else None}
    backend = "gloo" if device.type == "cpu" else "nccl"
    if "RANK" in os.environ and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The launcher's store outlives a restart: the addresses of dead processes must not be found there.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = dist.PrefixStore(
            f"attempt_{restarts()}", dist.TCPStore(host, port, size, is_master=False, timeout=timeout)
        )
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, **keys)
    elif "RANK" in os.environ:
        dist.init_process_group(backend, **keys)
    else:
        # One process alone: any free port will do, nobody else looks for it.
        dist.init_process_group(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1, **keys)


def initialize(config: Config) -> World:
    """Start torch.distributed and megatron-core's process groups for `config.parallel`; set all seeds.

    Raises:
        UserError: the device asked for is not there.
    """
    device = select_device(config.train.device)
    if device.type == "cpu":
        from megatron_md import cpu

        cpu.activate()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    else:
        cuda.activate(device)
    if config.train.deterministic:
        for name, value in cuda.DETERMINISTIC_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        from megatron.core import optimizer as core_optimizer

        if not core_optimizer.USING_PYTORCH_OPTIMIZER:
            raise UserError(
                "train.device is cpu, but megatron-core found Transformer Engine or apex, whose optimizer knows CUDA "
                "only: run on a CUDA device, or in an environment without them"
            )
    # A hang is to be found, and its rank named, before the backend gives up.
    timeout = timedelta(seconds=max(config.parallel.timeout_seconds, config.train.hang_timeout + 60.0))
    _init_process_group(device, timeout)

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_md import core_compat

    core_compat.quieten()
    layout = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
        create_gloo_process_groups=False,
    )
    torch.manual_seed(config.seed)
    # Dropout draws from the default generator, so that the tracker which needs no CUDA generator serves everywhere.
    model_parallel_cuda_manual_seed(config.seed, inference_rng_tracker=True, force_reset_rng=True)
    return current_world(device)


def current_world(device: torch.device) -> World:
    """This process's place in the job whose process groups megatron-core has already."""
    from megatron.core import parallel_state

    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    )


def sum_over_ranks(figures: torch.Tensor, world: World) -> torch.Tensor:
    """Sum over data-parallel ranks of what the last pipeline stages hold, given to every rank (on the CPU).

    The context-parallel ranks of one share hold the same figures: each sums over its own kind.
    """
    if world.size == 1:
        return figures.cpu()
    from megatron.core import parallel_state

    figures = figures.to(world.device)
    if world.is_last_stage:
        dist.all_reduce(figures, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            figures,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return figures.cpu()


def shared(world: World, jobs: Sequence[Job], work: Callable[[Job], Result]) -> list[Result]:
    """`[work(job) for job in jobs]` on every rank, each data-parallel rank doing its share; every rank calls this.

    The ranks of one share call `work` on the same jobs in the same order.
    """
    mine = {number: work(jobs[number]) for number in range(world.data_rank, len(jobs), world.data_size)}
    found: dict[int, Result] = {}
    for part in together(lambda: mine) if world.data_size > 1 else [mine]:
        found |= part
    return [found[number] for number in range(len(jobs))]


def shutdown() -> None:
    """End megatron-core's process groups and torch.distributed."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def session(config: Config) -> Iterator[World]:
    """Distributed work from start to end; on an error in one rank of several the groups are left to die with it.

    A collective shutdown after one rank's exception would wait for peers that are still computing.
    """
    try:
        yield initialize(config)
    except BaseException:
        if dist.is_initialized() and dist.get_world_size() == 1:
            shutdown()
        raise
    shutdown()

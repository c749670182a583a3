"""What a step of block diffusion costs beside one of masked diffusion, at equal tokens of text.

    python benchmarks/blocks.py 50m --block 32 --threads 2 --repeats 5

Three steps of one model take turns: masked diffusion; block diffusion; block diffusion behind a mask over all pairs of
the 2L places, as it would be without `model/block_attention.py`. Peak memory is that of a process of its own on CPUs,
and of the device's allocator on CUDA.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from loops import build_stepper, memory_of, random_rows, timed

from megatron_md import parallel
from megatron_md.config import (
    Config,
    DataConfig,
    ObjectiveConfig,
    ParallelConfig,
    TrainConfig,
    config_from_mapping,
    resolve,
)
from megatron_md.diffusion.objective import build_objective
from megatron_md.model import attention
from megatron_md.train.step import Stepper

ROWS = {"tiny": (256, 8), "50m": (512, 4)}
ON_CUDA = {"50m": (1024, 32), "1b-aligned": (4096, 1)}


def dense(query: Any, key: Any, value: Any, rows: Any, attend: Any, scale: float) -> torch.Tensor:
    """Attention in blocks behind one mask over all pairs."""
    place = torch.arange(len(query), device=query.device)
    context: torch.Tensor = attend(query, key, value, rows.mask(place, place, "dense"))
    return context


def steps_of(shape: str, block: int, device: str) -> tuple[dict[str, Callable[[], Any]], int]:
    """The steps by name, and the tokens of one."""
    is_cuda = device == "cuda"
    length, size = (ON_CUDA if is_cuda else ROWS)[shape]
    keys = {"preset": shape, "vocab": 32768 if is_cuda else 8192}
    config = resolve(
        Config(
            model=config_from_mapping({"model": keys}).model,
            data=DataConfig(seq_length=length),
            objective=ObjectiveConfig(name="block_diffusion", block_size=block, mask_schedule="uniform:0.45,0.55"),
            parallel=ParallelConfig(distributed_optimizer=is_cuda),
            train=TrainConfig(
                global_batch_size=size, micro_batch_size=size, device=device, precision="bf16" if is_cuda else "fp32"
            ),
        )
    )
    world = parallel.initialize(config)
    rows, blocks = random_rows(config), build_stepper(config, world)
    keys_of_rows = replace(config.objective, name="masked_diffusion", block_size=None)
    objective = build_objective(keys_of_rows, seed=config.seed, mask_token_id=blocks.objective.mask_token_id)
    whole = Stepper(replace(config, objective=keys_of_rows), world, blocks.chunks, blocks.optimizer, objective)

    def step(stepper: Stepper) -> Any:
        return stepper.train(stepper.corrupt(rows))

    def dense_step() -> Any:
        with mock.patch.object(attention, "attend_in_blocks", dense):
            return step(blocks)

    steps = {"masked_diffusion": lambda: step(whole), f"blocks of {block}": lambda: step(blocks)}
    return {**steps, f"blocks of {block}, dense mask": dense_step}, size * length


def peaks_of(steps: dict[str, Callable[[], Any]], options: list[str], device: str) -> dict[str, float]:
    """Peak GiB of each step."""
    if device == "cuda":
        peaks = {}
        for name, step in steps.items():
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30
        return peaks
    commands = [[sys.executable, __file__, *options, "--only", str(number)] for number in range(len(steps))]
    found = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for command in commands]
    return {name: float(text.split()[-1]) for name, text in zip(steps, found, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted({*ROWS, *ON_CUDA}))
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    steps, tokens = steps_of(args.shape, args.block, args.device)
    torch.set_num_threads(args.threads)
    if args.only is not None:
        print(memory_of(list(steps.values())[args.only]))
        return
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(args.repeats + 1):
        for name, step in steps.items():
            elapsed = timed(step)
            if repeat:  # the first round warms up
                seconds[name].append(elapsed)
    options = [args.shape, "--block", str(args.block), "--threads", str(args.threads)]
    peaks = peaks_of(steps, options, args.device)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    hardware = f"{args.threads} threads, {platform.processor() or platform.machine()}"
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else hardware
    print(f"{args.shape}, {tokens:,} tokens of text: {hardware}, torch {torch.__version__}, commit {commit}")
    first = next(iter(steps))
    for name, values in seconds.items():
        ratio = statistics.median(v / o for v, o in zip(values, seconds[first], strict=True))
        print(
            f"  {name:26s} {statistics.median(values):7.3f} s, {ratio:.2f}x   peak {peaks[name]:5.2f} GiB, "
            f"{peaks[name] / peaks[first]:.2f}x"
        )
    parallel.shutdown()


if __name__ == "__main__":
    main()

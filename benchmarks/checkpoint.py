"""What a checkpoint costs: how long a save and its checks hold up training, how long a resume takes, its size.

    python benchmarks/checkpoint.py 50m --threads 2 --repeats 3

One process, CPU, fp32. Synchronous and background saves take turns; between them come ordinary steps, so that the share
of a step is measured under the same load. Steps beside a background write are reported too: the writer shares the
processor with them. The checks before a save are part of its stall, and timed alone as well: a look at every number of
weights and optimizer, and checksums of the weights (what ranks compare with the distributed optimizer) or of both
(without it); the comparison itself, of 16 bytes per parameter tensor, is not in them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_md import parallel
from megatron_md.batch import BatchPosition, CleanBatch
from megatron_md.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig, resolve

MASK = 3
CHECKS = ("look for NaN", "sum weights", "sum all")
SHAPES = {
    "tiny": (ModelConfig(vocab=8192), 256, 8),
    "50m": (ModelConfig(vocab=32000, layers=8, hidden=512, heads=8, kv_heads=8, ffn=1376), 512, 4),
}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def build(shape: str) -> tuple[list[Any], Any, Callable[[], None]]:
    """Model chunks, optimizer, and a training step."""
    model, length, rows = SHAPES[shape]
    config = resolve(
        Config(
            model=model,
            data=DataConfig(seq_length=length),
            parallel=ParallelConfig(distributed_optimizer=True),
            train=TrainConfig(global_batch_size=rows, micro_batch_size=rows, device="cpu"),
        )
    )
    world = parallel.initialize(config)
    from megatron_md.diffusion.objective import build_objective
    from megatron_md.model.build import build_model, wrap_data_parallel
    from megatron_md.train.optimizer import build_optimizer, set_hyperparameters
    from megatron_md.train.step import Stepper

    chunks = wrap_data_parallel(build_model(config, world.device, causal=False, mask_token_id=MASK), config)
    optimizer = build_optimizer(config, chunks)
    set_hyperparameters(optimizer, lr=1e-4, weight_decay=0.1)
    objective = build_objective(config.objective, seed=0, mask_token_id=MASK)
    stepper = Stepper(config, world, chunks, optimizer, objective)
    tokens = np.random.default_rng(0).integers(MASK + 1, config.model.vocab, (rows, length))
    clean = CleanBatch(tokens, np.ones_like(tokens, dtype=bool), np.arange(rows), BatchPosition(0, rows))
    batch = objective.corrupt(clean)
    return chunks, optimizer, lambda: void(stepper.train([batch]))


def void(value: Any) -> None:
    """Forget a result."""


def measure(shape: str, repeats: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of each kind of event, and the size of a checkpoint."""
    chunks, optimizer, step = build(shape)
    from megatron_md.checkpoint import state
    from megatron_md.checkpoint.integrity import verify
    from megatron_md.checkpoint.manager import CheckpointManager
    from megatron_md.checkpoint.replicas import checksum
    from megatron_md.model.build import count_parameters
    from megatron_md.train.progress import Progress

    manager = CheckpointManager(folder, keep_last=1, resolved_config="")
    found: dict[str, list[float]] = {
        name: []
        for name in (
            *CHECKS,
            "step",
            "synchronous stall",
            "background stall",
            "background total",
            "step beside a write",
        )
    }
    weights = [parameter for _, parameter in state.named_parameters(chunks)]
    states = [values for piece in state.optimizer_slices(optimizer) for values in piece.tensors.values()]
    checks = (
        lambda: void(state.names_of_not_finite(chunks, optimizer)),
        lambda: void([checksum(values) for values in weights]),
        lambda: void([checksum(values) for values in weights + states]),
    )
    step()
    for number in range(repeats + 1):
        found["step"] += [seconds(step) for _ in range(2)]
        for name, check in zip(CHECKS, checks, strict=True):
            found[name].append(seconds(check))
        progress = Progress(number, 0, 0, 1)
        found["synchronous stall"].append(manager.save(chunks, optimizer, progress).stall_seconds)
        manager.begin(chunks, optimizer, progress)
        saved = None
        while saved is None:
            found["step beside a write"].append(seconds(step))
            saved = manager.finish_if_written()
        found["background stall"].append(saved.stall_seconds)
        found["background total"].append(saved.total_seconds)
    # The first save of a process is checked by megatron-core as a whole, and warms up.
    found = {name: values[1:] for name, values in found.items()}
    found["resume"] = [seconds(lambda: manager.load_newest(chunks, optimizer)) for _ in range(repeats)]
    size = sum(path.stat().st_size for path in saved.path.iterdir())
    found["bytes per parameter"] = [size / count_parameters(chunks)]
    found["bytes"] = [float(size)]
    found["hashing"] = [seconds(lambda: verify(saved.path)) for _ in range(repeats)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to write; a temporary folder if left out")
    parser.add_argument("--json", help="also write every measured value to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(args.shape, args.repeats, Path(folder))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{args.shape}: {args.threads} threads, {platform.processor() or platform.machine()}, commit {commit}")
    step = statistics.median(found["step"])
    stalls = ("synchronous stall", "background stall", "background total", "step beside a write", "resume")
    for name in ("step", *CHECKS, *stalls):
        median = statistics.median(found[name])
        print(f"  {name:20s} {median:7.3f} s   {median / step:6.1%} of a step")
    print(f"  {found['bytes per parameter'][0]:.2f} bytes per parameter, {found['bytes'][0] / 2**20:.0f} MiB")
    per_byte = statistics.median(found["hashing"]) / found["bytes"][0]
    print(f"  verifying hashes {100e9 * per_byte:.0f} s per 100 GB on one rank; R ranks share the files")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""Tokens per second of one optimizer step: ours (through megatron-core) against a plain PyTorch loop, side by side.

    python benchmarks/train_step.py 50m --threads 2 --repeats 8

Three loops take turns, so that a noisy machine is noisy for all of them: our step, a plain loop that computes logits
at every position, and the same plain loop with our head at the masked positions. Same shapes, data, masks and optimizer
settings, one process, fp32 on the CPU; with --device cuda in bf16 (the plain loops under autocast) and with the share
of the device's peak. With --memory each loop runs in a process of its own and the peak is compared.

    python benchmarks/train_step.py 50m --documents 200

compares our step with itself instead: rows of 1024 tokens, attention over whole rows against attention within documents
of the given length.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from loops import PlainLoop, build_stepper, memory_of, random_rows, timed

from megatron_md import parallel
from megatron_md.config import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    TrainConfig,
    config_from_mapping,
    resolve,
)
from megatron_md.run.estimate import training_flops_per_token
from megatron_md.train.step import Stepper

SHAPES = {
    "tiny": (ModelConfig(vocab=8192), 256, 8),
    "50m": (ModelConfig(vocab=32000, layers=8, hidden=512, heads=8, kv_heads=8, ffn=1376), 512, 4),
}
ON_CUDA = {"50m": (512, 64), "1b-aligned": (4096, 1)}  # tokens of a row, rows
LOOPS = ("ours", "plain, full logits", "plain, our head")
DOCUMENT_LOOPS = ("ours", "ours, within documents")


def build(shape: str, documents: int | None, device: str) -> tuple[dict[str, Callable[[], None]], int, float]:
    """The loops' steps, the tokens of one step, and its FLOPs."""
    model, length, size = SHAPES.get(shape) or (config_from_mapping({"model": {"preset": shape}}).model, 0, 0)
    is_cuda = device == "cuda"
    length, size = ON_CUDA[shape] if is_cuda else (length, size)
    if documents is not None:
        length, size = 1024, length * size // 1024
    config = resolve(
        Config(
            model=model,
            data=DataConfig(seq_length=length),
            objective=ObjectiveConfig(mask_schedule="uniform:0.45,0.55"),
            parallel=ParallelConfig(distributed_optimizer=is_cuda),
            train=TrainConfig(
                global_batch_size=size,
                micro_batch_size=size,
                device=device,
                precision="bf16" if is_cuda else "fp32",
            ),
        )
    )
    world = parallel.initialize(config)
    rows = random_rows(config, documents)
    stepper = build_stepper(config, world)

    def our_step(stepper: Stepper = stepper) -> None:
        stepper.train(stepper.corrupt(rows))

    if documents is not None:
        apart = replace(config, data=replace(config.data, document_attention="within_document"))
        within = Stepper(apart, world, stepper.chunks, stepper.optimizer, stepper.objective)
        steps = dict(zip(DOCUMENT_LOOPS, (our_step, lambda: our_step(within)), strict=True))
    else:
        plain = PlainLoop(config, stepper.corrupt(rows), world.device)
        steps = dict(zip(LOOPS, (our_step, plain.full_logits, plain.our_head), strict=True))
    tokens = config.train.global_batch_size * config.data.seq_length
    fraction = sum(len(batch.targets_M) for batch in stepper.corrupt(rows)) / tokens
    return steps, tokens, tokens * training_flops_per_token(config, config.model.vocab, fraction)


def peak_memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak resident GiB of each loop in a process of its own, less what building all of them takes."""
    peaks = {}
    options = [args.shape, "--threads", str(args.threads), "--device", args.device]
    options += ["--documents", str(args.documents)] if args.documents is not None else []
    for number, name in enumerate(LOOPS if args.documents is None else DOCUMENT_LOOPS):
        command = [sys.executable, __file__, *options, "--only", str(number)]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted({*SHAPES, *ON_CUDA}))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--documents", type=int, help="compare attention within documents of this length instead")
    parser.add_argument("--memory", action="store_true", help="also compare peak memory")
    parser.add_argument("--profile", action="store_true", help="print where our step spends its time")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    steps, tokens, flops = build(args.shape, args.documents, args.device)
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
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    peak = parallel.peak_flops(torch.device(args.device), "bf16")
    hardware = f"{args.threads} threads, {platform.processor() or platform.machine()}"
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else hardware
    print(f"{args.shape}: {hardware}, torch {torch.__version__}, commit {commit}")
    ours = seconds["ours"]
    for name, values in seconds.items():
        ratio = statistics.median(v / o for v, o in zip(values, ours, strict=True))
        median = statistics.median(values)
        share = "" if peak is None else f"   {flops / median / peak:.1%} of the peak"
        print(f"  {name:22s} {tokens / median:8,.0f} tokens/s  {median:6.3f} s   ours is {ratio:.2f}x as fast{share}")
    if args.memory:
        peaks = peak_memory(args)
        for name, peak in peaks.items():
            print(f"  {name:22s} peak {peak:5.2f} GiB above the built models   {peak / peaks['ours']:.2f}x ours")
    if args.profile:
        with torch.profiler.profile() as profile:
            steps["ours"]()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60))


if __name__ == "__main__":
    main()

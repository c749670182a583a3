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
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from plain_transformer import PlainTransformer

from megatron_md import cpu, parallel
from megatron_md.batch import BatchPosition, CleanBatch, CorruptedBatch
from megatron_md.config import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    ResolvedConfig,
    TrainConfig,
    config_from_mapping,
    resolve,
)
from megatron_md.run.estimate import training_flops_per_token

MASK = 3
SHAPES = {
    "tiny": (ModelConfig(vocab=8192), 256, 8),
    "50m": (ModelConfig(vocab=32000, layers=8, hidden=512, heads=8, kv_heads=8, ffn=1376), 512, 4),
}
ON_CUDA = {"50m": (512, 64), "1b-aligned": (4096, 1)}  # tokens of a row, rows
LOOPS = ("ours", "plain, full logits", "plain, our head")
DOCUMENT_LOOPS = ("ours", "ours, within documents")


def build(shape: str, documents: int | None, device: str) -> tuple[dict[str, Callable[[], None]], int, float]:
    """The loops' steps, the tokens of one step, and its FLOPs."""
    model, length, rows = SHAPES.get(shape) or (config_from_mapping({"model": {"preset": shape}}).model, 0, 0)
    is_cuda = device == "cuda"
    length, rows = ON_CUDA[shape] if is_cuda else (length, rows)
    if documents is not None:
        length, rows = 1024, length * rows // 1024
    config = resolve(
        Config(
            model=model,
            data=DataConfig(seq_length=length),
            objective=ObjectiveConfig(mask_schedule="uniform:0.45,0.55"),
            parallel=ParallelConfig(distributed_optimizer=is_cuda),
            train=TrainConfig(
                global_batch_size=rows,
                micro_batch_size=rows,
                device=device,
                precision="bf16" if is_cuda else "fp32",
            ),
        )
    )
    world = parallel.initialize(config)
    from megatron_md.diffusion.objective import build_objective
    from megatron_md.model.build import build_model, wrap_data_parallel
    from megatron_md.train.optimizer import build_optimizer, set_hyperparameters
    from megatron_md.train.step import Stepper

    vocab, keys = config.model.vocab, config.optimizer
    tokens = np.random.default_rng(0).integers(MASK + 1, vocab, (rows, length))
    boundaries = np.append(np.arange(0, length, documents or length), length).astype(np.int32)
    position = BatchPosition(0, rows)
    clean = CleanBatch(
        tokens, np.ones_like(tokens, dtype=bool), np.arange(rows), position, cu_seqlens=[boundaries] * rows
    )
    objective = build_objective(config.objective, seed=0, mask_token_id=MASK)
    batch = objective.corrupt(clean)
    chunks = wrap_data_parallel(build_model(config, world.device, causal=False, mask_token_id=MASK), config)
    optimizer = build_optimizer(config, chunks)
    set_hyperparameters(optimizer, lr=keys.lr, weight_decay=keys.weight_decay)
    stepper = Stepper(config, world, chunks, optimizer, objective)

    def our_step(stepper: Stepper = stepper) -> None:
        stepper.train(stepper.corrupt([clean]))

    if documents is not None:
        apart = replace(config, data=replace(config.data, document_attention="within_document"))
        within = Stepper(apart, world, chunks, optimizer, objective)
        steps = dict(zip(DOCUMENT_LOOPS, (our_step, lambda: our_step(within)), strict=True))
    else:
        steps = dict(zip(LOOPS, (our_step, *plain_steps(config, batch, world.device)), strict=True))
    fraction = len(batch.targets_M) / tokens.size
    return steps, tokens.size, tokens.size * training_flops_per_token(config, vocab, fraction)


def plain_steps(config: ResolvedConfig, batch: CorruptedBatch, device: torch.device) -> list[Callable[[], None]]:
    """A step of the plain loop with logits at every position, and one with our head at the masked ones."""
    from megatron_md.model.head import Prediction, masked_cross_entropy

    model, vocab, keys = config.model, config.model.vocab, config.optimizer
    plain = PlainTransformer(model, vocab).to(device)
    adamw = torch.optim.AdamW(
        plain.parameters(), keys.lr, (keys.beta1, keys.beta2), keys.eps, keys.weight_decay, fused=True
    )
    arrays = (batch.tokens_BL, batch.positions_M, batch.targets_M, batch.weights_M)
    inputs, positions, targets, weights = (torch.from_numpy(array).to(device) for array in arrays)
    excluded = torch.tensor([MASK], device=device)

    def full_logits(hidden_BLD: torch.Tensor) -> torch.Tensor:
        logits_BLV = F.linear(hidden_BLD, plain.output)
        nll_M = F.cross_entropy(logits_BLV.view(-1, vocab)[positions], targets, reduction="none")
        return (nll_M * weights).sum()

    def our_head(hidden_BLD: torch.Tensor) -> torch.Tensor:
        hidden_MD = hidden_BLD.reshape(-1, model.hidden).index_select(0, positions)
        prediction = Prediction(positions, targets, weights)
        return masked_cross_entropy(
            hidden_MD, plain.output.to(hidden_MD.dtype), prediction, first_token=0, excluded=excluded, chunk=1024
        ).loss

    def plain_step(head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        # The yardstick pays nothing for our stand-ins.
        with cpu.suspended(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            adamw.zero_grad()
            (head(plain(inputs)) / batch.denominator).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), keys.clip_grad)
            adamw.step()

    return [lambda: plain_step(full_logits), lambda: plain_step(our_head)]


def timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak resident GiB of each loop in a process of its own, less what building all of them takes."""
    peaks = {}
    options = [args.shape, "--threads", str(args.threads), "--device", args.device]
    options += ["--documents", str(args.documents)] if args.documents is not None else []
    for number, name in enumerate(LOOPS if args.documents is None else DOCUMENT_LOOPS):
        command = [sys.executable, __file__, *options, "--only", str(number)]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return peaks


def memory_of(step: Callable[[], None]) -> float:
    """GiB by which the resident set, or the device's memory, grows at its peak during two steps."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        taken = torch.cuda.memory_allocated()
        for _ in range(2):
            step()
        return (torch.cuda.max_memory_allocated() - taken) / 2**30
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2):
        step()
    done.set()
    watcher.join()
    return (peak - before) / 2**30


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

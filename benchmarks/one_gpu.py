"""One GPU against what it could do: our step and a plain PyTorch loop, at the sizes that one device holds.

    python benchmarks/one_gpu.py                          1b-aligned, 1b and as many layers of 8b as fit
    python benchmarks/one_gpu.py 8b --layers 12 --rows 2
    python benchmarks/one_gpu.py tiny --device cpu --eager --repeats 1       (the same on a CPU, to try the script)

Ours is the whole step: corruption, megatron-core's schedule, distributed optimizer, bf16. The plain loop is compiled by
torch.compile, with scaled-dot-product attention, fp32 weights under autocast, torch's fused AdamW, and logits at every
position. Both take the same rows and masks. Each runs in a process of its own, so that neither pays for the other's
memory; one that does not fit says so. For each:

    tokens/s    of the median step
    MFU         of the FLOPs that it executes (full logits count), in the dense bf16 peak of the data sheet
    peak        memory that torch has allocated at most, weights and optimizer included
    outside     share of the step's time in which the device neither multiplies matrices nor attends: other kernels and
                waiting, from torch.profiler

Beside them stands what `megatron-md simulate` says of ours on this device (another one: --hardware).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loops import PlainLoop, build_stepper, corrupted, memory_of, random_rows, timed
from torch.autograd import DeviceType

from megatron_md import parallel
from megatron_md.config import ResolvedConfig, config_from_mapping, resolve, to_yaml
from megatron_md.run.check import check_config
from megatron_md.run.estimate import memory_per_rank, training_flops_per_token
from megatron_md.simulate.hardware import hardware_names

# Tokens of a row, rows of a micro-batch.
PRESETS = {"1b-aligned": (4096, 2), "1b": (4096, 2), "8b": (4096, 1), "50m": (512, 32), "tiny": (128, 2)}
DEFAULT = ("1b-aligned", "1b", "8b")
LOOPS = ("ours", "plain, full logits")
SMALL_VOCAB = 8192  # of the presets that name none
ROOM = 0.9  # of the device's memory: the estimate leaves out fragmentation, workspaces and the CUDA context

# Names of kernels on CUDA and of operators on the CPU.
ATTENTION = re.compile(r"flash|fmha|attention|sdpa|mha_", re.IGNORECASE)
PRODUCT = re.compile(r"gemm|cutlass|cublas|nvjet|wgmma|xmma|splitk|aten::(?:addmm|mm|bmm|baddbmm)\b", re.IGNORECASE)


def config_of(args: argparse.Namespace, preset: str, layers: int | None = None) -> ResolvedConfig:
    """The run that is measured: one process, one device."""
    length, rows = PRESETS[preset]
    rows = args.rows or rows
    is_cuda = args.device == "cuda"
    model: dict[str, Any] = {"preset": preset}
    if layers is not None:
        model["layers"] = layers
    config = config_from_mapping(
        {
            "model": model,
            "data": {"seq_length": length},
            "objective": {"mask_schedule": "uniform:0.45,0.55"},
            "parallel": {"distributed_optimizer": is_cuda},
            "train": {
                "global_batch_size": rows * args.micro_batches,
                "micro_batch_size": rows,
                "device": args.device,
                "precision": "bf16" if is_cuda else "fp32",
            },
        }
    )
    return resolve(config, config.model.vocab or SMALL_VOCAB)


def largest_slice(args: argparse.Namespace, preset: str, memory_bytes: float) -> int:
    """Layers of a preset that fit a device by our own estimate, all of them at most and one at least."""
    whole = config_of(args, preset).model.layers
    for layers in range(whole, 1, -1):
        config = config_of(args, preset, layers)
        if memory_per_rank(config, check_config(config, 1, corpora=False)).total <= ROOM * memory_bytes:
            return layers
    return 1


def time_by_class(seconds: Mapping[str, float]) -> dict[str, float]:
    """Time of kernels or operators by what they do."""
    found = {"attention": 0.0, "products": 0.0, "other": 0.0}
    for name, spent in seconds.items():
        kind = "attention" if ATTENTION.search(name) else "products" if PRODUCT.search(name) else "other"
        found[kind] += spent
    return found


def profiled(step: Any, device: torch.device) -> dict[str, float]:
    """Seconds of one step by class, of kernels on CUDA and of operators on the CPU."""
    with torch.profiler.profile() as profile:
        timed(step)
    is_cuda = device.type == "cuda"
    seconds: dict[str, float] = {}
    for event in profile.key_averages():
        # Operators tell the time of the kernels that they start as well: only the kernels themselves are counted.
        if is_cuda and event.device_type is not DeviceType.CUDA:
            continue
        spent = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        seconds[event.key] = seconds.get(event.key, 0.0) + spent / 1e6
    return time_by_class(seconds)


def measure(args: argparse.Namespace, preset: str, layers: int | None, loop: str) -> dict[str, Any]:
    """Run one loop and say what it did; in a process of its own."""
    config = config_of(args, preset, layers)
    world = parallel.initialize(config)
    rows = random_rows(config)
    batches = corrupted(config, rows)
    if loop == "ours":
        stepper = build_stepper(config, world)

        def step() -> None:
            stepper.train(stepper.corrupt(rows))
    else:
        step = PlainLoop(config, batches, world.device, compiled=not args.eager).full_logits
    for _ in range(args.warmup):
        timed(step)
    seconds = statistics.median(timed(step) for _ in range(args.repeats))
    tokens = config.train.global_batch_size * config.data.seq_length
    share = sum(len(batch.targets_M) for batch in batches) / tokens if loop == "ours" else 1.0
    flops = tokens * training_flops_per_token(config, config.model.vocab, share, recomputation=True)
    peak_flops = parallel.peak_flops(world.device, config.train.precision)
    by_class = profiled(step, world.device)
    computing = by_class["attention"] + by_class["products"]
    found = {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "flops": flops,
        "mfu": None if peak_flops is None else flops / seconds / peak_flops,
        # Under the profiler a CPU's operators take longer than without it.
        "outside": 1.0 - computing / max(seconds, sum(by_class.values())),
        "seconds_by_class": by_class,
        "peak_gib": memory_of(step, whole=True),
    }
    parallel.shutdown()
    return found


def in_a_process(words: list[str], preset: str, layers: int | None, loop: str) -> dict[str, Any]:
    """`measure` in a process of its own, or why it has failed."""
    own = [preset, "--only", loop, *(["--layers", str(layers)] if layers is not None else [])]
    done = subprocess.run([sys.executable, __file__, *own, *words], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" in done.stderr:
        return {"failure": "out of memory"}
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {"failure": lines[-1]}


def simulated(args: argparse.Namespace, preset: str, layers: int | None) -> dict[str, Any]:
    """What `megatron-md simulate` says of our loop on `args.hardware`, or why it says nothing."""
    config = config_of(args, preset, layers)
    config = replace(config, parallel=replace(config.parallel, distributed_optimizer=True))
    config = replace(config, train=replace(config.train, device="cuda", precision="bf16"))
    with tempfile.TemporaryDirectory() as folder:
        file, figures = Path(folder) / "run.yaml", Path(folder) / "figures.json"
        file.write_text(to_yaml(config))
        words = ["-m", "megatron_md", "simulate", str(file), "--hardware", args.hardware, "--json", str(figures)]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failure": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
        (found,) = json.loads(figures.read_text())
    forecast = found["forecast"]
    return {
        "tokens_per_second": forecast["tokens_per_second"],
        "mfu": forecast["mfu"],
        "peak_gib": forecast["peak"] / 2**30,
        "outside": None,
    }


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """The figures, a line for each loop of each shape."""
    width = max(5, *(len(result["shape"]) for result in results)) + 2
    yield f"{'shape':{width}s}{'loop':24s}{'tokens/s':>10s}{'MFU':>8s}{'peak':>11s}{'outside':>9s}"
    for result in results:
        for loop, found in result["loops"].items():
            head = f"{result['shape']:{width}s}{loop:24s}"
            if "failure" in found:
                yield f"{head}{found['failure']}"
                continue
            mfu = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
            outside = "" if found["outside"] is None else f"{found['outside']:9.1%}"
            yield f"{head}{found['tokens_per_second']:10,.0f}{mfu:>8s}{found['peak_gib']:7.1f} GiB{outside}"
        speeds = [result["loops"][loop].get("tokens_per_second") for loop in LOOPS]
        if all(speeds):
            yield f"{'':{width}s}ours is {speeds[0] / speeds[1]:.2f}x as fast"


def shape_of(args: argparse.Namespace, preset: str) -> tuple[str, int | None]:
    """A shape's name in the table, and its layers where they are not all of the preset's."""
    whole = config_of(args, preset).model.layers
    layers = args.layers
    if layers is None and preset == "8b" and args.device == "cuda":
        layers = largest_slice(args, preset, torch.cuda.get_device_properties(0).total_memory)
    length, rows = PRESETS[preset]
    batch = f"{args.micro_batches}x{args.rows or rows}x{length}"
    if layers is None or layers == whole:
        return f"{preset}, {batch}", None
    return f"{preset} ({layers} of {whole} layers), {batch}", layers


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=[], metavar="PRESET", help=f"{', '.join(PRESETS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--layers", type=int, help="layers of the model (all; of 8b as many as fit)")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch (by the preset)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step (4)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts (3)")
    parser.add_argument("--repeats", type=int, default=10, help="steps of which the median is told (10)")
    parser.add_argument("--eager", action="store_true", help="do not compile the plain loop")
    parser.add_argument("--hardware", metavar="NAME", help="device to simulate, h100, h200 or b200 (this one)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there as well")
    parser.add_argument("--only", choices=LOOPS, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.presets = args.presets or list(DEFAULT)
    for preset in args.presets:
        if preset not in PRESETS:
            parser.error(f"{preset}: choose from {', '.join(PRESETS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here: --device cpu --eager tries the script with the preset tiny")
    if args.hardware is None and args.device == "cuda":
        name = torch.cuda.get_device_name().lower()
        args.hardware = next((known for known in hardware_names() if known in name), None)
    return args


def main(words: list[str]) -> None:
    args = parse(words)
    if args.only is not None:
        print(json.dumps(measure(args, args.presets[0], args.layers, args.only)))
        return
    options = [word for word in words if word not in args.presets]
    results = []
    for preset in args.presets:
        shape, layers = shape_of(args, preset)
        loops = {loop: in_a_process(options, preset, layers, loop) for loop in LOOPS}
        if args.hardware is not None:
            loops[f"ours, {args.hardware} simulated"] = simulated(args, preset, layers)
        results.append({"shape": shape, "loops": loops})
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}, commit {commit}")
    print("\n".join(table(results)))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"hardware": hardware, "torch": torch.__version__, "commit": commit, "results": results}, file)


if __name__ == "__main__":
    main(sys.argv[1:])

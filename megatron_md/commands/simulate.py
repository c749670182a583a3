"""`megatron-md simulate`: what a step takes on GPUs that are not there, from the real step on fake tensors."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from megatron_md.commands.arguments import check_folder_of, positive
from megatron_md.config import Config, ConfigError, load_config
from megatron_md.messages import progress, say, tell
from megatron_md.run.check import check_config, resolve_config
from megatron_md.run.epochs import count_steps
from megatron_md.simulate.children import Run, simulate, stages_to_simulate
from megatron_md.simulate.hardware import Hardware, hardware_names, load_hardware
from megatron_md.simulate.report import as_json, report, table
from megatron_md.simulate.roofline import forecast
from megatron_md.simulate.sweep import candidates

EXAMPLES = """examples:
  megatron-md simulate examples/8b/pretrain.yaml --world-size 64
  megatron-md simulate examples/8b/pretrain.yaml --world-size 8 --hardware h200 parallel.tensor=2 train.recompute=none
  megatron-md simulate examples/8b/pretrain.yaml --world-size 64 --sweep
  megatron-md simulate examples/tiny/demo.yaml model.vocab=8192 --json step.json

One CPU process per pipeline stage builds the real model, data-parallel module and optimizer on tensors without values
and makes two steps; no GPU, no data. It needs a C++ compiler once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run; keys as in megatron-md train --help")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="keys to change")
    parser.add_argument(
        "--world-size", type=positive, metavar="N", help="processes, one a device (default: one replica of the model)"
    )
    parser.add_argument(
        "--hardware",
        default="h100",
        metavar="NAME",
        help=f"{', '.join(hardware_names())}, or a YAML file with the same keys (default h100)",
    )
    parser.add_argument(
        "--sweep",
        type=positive,
        nargs="?",
        const=6,
        metavar="N",
        help="try the N most promising layouts that fit (default 6) and print a table, best first",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument(
        "--trust", action="store_true", help="import what the config names also from the working directory"
    )


def run(args: argparse.Namespace) -> int:
    """Simulate and print.

    Raises:
        ConfigError: the config cannot be run.
        RunFailedError: a simulation fails.
    """
    hardware = load_hardware(args.hardware)
    check_folder_of(args.json, "--json ")
    config = load_config(args.config, args.overrides)
    if config.train.precision == "fp8":
        raise ConfigError(f"{args.config}: train.precision fp8 is not simulated; add train.precision=bf16")
    config = replace(config, train=replace(config.train.settled("cuda"), device="cuda"))
    world_size = args.world_size or config.parallel.replica
    try:
        config = count_steps(config)
        runs, left = _runs(config, world_size, hardware, args.sweep, trust=args.trust)
    except ConfigError as error:
        raise ConfigError([f"{args.config}: {line}" for line in error.lines]) from None
    total = sum(len(stages_to_simulate(layout.pipeline)) for _, layout in runs)
    with progress(f"simulating {len(runs)} layout(s)", total) as move:
        stages = simulate(runs, trust=args.trust, done=move)
    forecasts = [forecast(found, *one, hardware) for one, found in zip(runs, stages, strict=True)]
    if args.sweep:
        say(f"# {world_size} x {hardware.name}, best first", multiline=True)
        say(table([(*one, found) for one, found in zip(runs, forecasts, strict=True)]), multiline=True)
        if left:
            tell(f"megatron-md: note: {left} more layouts fit and were not simulated; --sweep {len(runs) + left} does")
    else:
        say(report(*runs[0], stages[0], hardware, forecasts[0]), multiline=True)
    if args.json:
        found = [
            as_json(*one, simulated, hardware, result)
            for one, simulated, result in zip(runs, stages, forecasts, strict=True)
        ]
        args.json.write_text(json.dumps(found, indent=1) + os.linesep)
    return 0


def _runs(
    config: Config, world_size: int, hardware: Hardware, sweep: int | None, *, trust: bool
) -> tuple[list[Run], int]:
    """What to simulate, and how many other layouts would fit."""
    if sweep is None:
        layout = check_config(config, world_size, corpora=False, trust=trust)
        return [(resolve_config(config), layout)], 0
    found = candidates(config, world_size, hardware, trust=trust)
    if not found:
        raise ConfigError(
            f"--sweep: no layout of {world_size} processes fits into the {hardware.memory_bytes / 2**30:.0f} GiB of "
            f"{hardware.name}; give more --world-size, or a smaller train.global_batch_size"
        )
    return found[:sweep], len(found[sweep:])

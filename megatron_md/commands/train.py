"""`megatron-md train`: checks the config before torch is imported, then trains here or starts the workers."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from megatron_md.commands.arguments import positive
from megatron_md.config import Config, ConfigError, explain, load_config
from megatron_md.messages import say, tell
from megatron_md.run.check import check_config, resolve_config
from megatron_md.run.check_corpora import corpus_problems, missing_files
from megatron_md.run.epochs import count_steps, local_passes
from megatron_md.run.estimate import report

EXAMPLES = f"""examples:
  megatron-md train examples/tiny/demo.yaml --nproc-per-node 2
  megatron-md train examples/tiny/demo.yaml parallel.tensor=1 train.steps=20 run_dir=runs/try
  megatron-md train examples/8b/pretrain.yaml --dry-run --world-size 64
  torchrun --nproc-per-node 2 -m megatron_md train examples/tiny/demo.yaml
  megatron-md train examples/8b/pretrain.yaml --nnodes 8 --nproc-per-node 8 --rdzv-endpoint node0:29500  # on every node
  megatron-md train examples/8b/pretrain.yaml --nproc-per-node 8 --max-restarts 10

exit codes:
  0 done   2 bad input   75 stopped on request (signal, RUN/stop) and saved: the same command goes on   1 anything else
  (torchrun has its own: 1 whatever a worker ends with)

keys of the YAML file and of section.key=value (a key of the command line wins over the file, the file over the preset):

{explain()}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run; see the keys below")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="keys to change")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print config, layout and estimates; start nothing, but import the modules under imports, which runs them",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="with --dry-run: import them also from the working directory, as training does, not only from PYTHONPATH "
        "and the installed packages",
    )
    parser.add_argument("--world-size", type=positive, metavar="N", help="processes that --dry-run assumes")
    parser.add_argument("--nproc-per-node", type=positive, metavar="N", help="processes on this machine (default 1)")
    parser.add_argument("--nnodes", type=positive, default=1, metavar="N", help="machines of the job (default 1)")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="after a fault, go on from the newest checkpoint N times",
    )
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the machines meet; needed for several")


def run(args: argparse.Namespace) -> int:
    """Train, or show what training would do.

    Raises:
        ConfigError: the config cannot be run.
    """
    # Torch tells each lost connection with a C++ stack as well; it reads this when it is imported, be it by a plug-in.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    config = load_config(args.config, args.overrides)
    is_worker = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    nproc = args.nproc_per_node or 1
    world = int(os.environ["WORLD_SIZE"]) if is_worker else nproc * args.nnodes
    if args.world_size is not None and not args.dry_run:
        raise ConfigError("--world-size belongs to --dry-run; to train, give --nproc-per-node and --nnodes")
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and not is_worker and args.nnodes == 1 and not args.dry_run:
        raise ConfigError(
            f"srun started {tasks} tasks without RANK and WORLD_SIZE: {tasks} runs in one directory; "
            "start one task per node with --nnodes and --rdzv-endpoint, as examples/8b/train.sbatch does"
        )
    if args.nnodes > 1 and args.rdzv_endpoint is None and not is_worker and not args.dry_run:
        raise ConfigError("--nnodes above 1 needs --rdzv-endpoint HOST:PORT, the same on every machine")
    try:
        if args.dry_run:
            given = is_worker or args.nproc_per_node or args.nnodes > 1
            return _dry_run(config, args.world_size or (world if given else config.parallel.replica), trust=args.trust)
        check_config(config, world)
    except ConfigError as error:
        raise ConfigError([f"{args.config}: {line}" for line in error.lines]) from None
    if is_worker or (world == 1 and not args.max_restarts):
        from megatron_md.run.pretrain import pretrain

        return pretrain(config)
    from megatron_md.train.launch import launch

    return launch(
        args.config,
        args.overrides,
        nproc_per_node=nproc,
        nnodes=args.nnodes,
        rdzv_endpoint=args.rdzv_endpoint,
        max_restarts=args.max_restarts,
        hang_timeout=config.train.hang_timeout,
    )


def _dry_run(config: Config, world_size: int, *, trust: bool) -> int:
    """Print the report; corpora that do not exist yet are only mentioned, those that do must fit."""
    layout = check_config(config, world_size, corpora=False, trust=trust)
    problems = list(corpus_problems(config))
    if problems:
        raise ConfigError(problems)
    config = count_steps(config)
    # What torch would find, as far as that can be told without it.
    has_cuda = config.train.device != "cpu" and Path("/proc/driver/nvidia/version").exists()
    config = replace(config, train=config.train.settled("cuda" if has_cuda else "cpu"))
    text = report(resolve_config(config), layout, local_passes(config))
    if os.environ.get("RANK", "0") == "0":
        say(text, multiline=True)
        for line in missing_files(config):
            tell(f"megatron-md: note: training would stop here: {line}")
    return 0

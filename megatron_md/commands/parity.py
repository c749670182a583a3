"""`megatron-md parity run | sweep | plot | validate`: the k-parity path."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_md.commands.arguments import positive
from megatron_md.config.loader import ConfigError
from megatron_md.config.schema import explain
from megatron_md.messages import say
from megatron_md.parity.config import ParityConfig, check_parity, load_parity_config

EXAMPLES = """examples:
  megatron-md parity sweep examples/parity/ci.yaml --workers 2
  megatron-md parity plot runs/parity-ci
  megatron-md parity run examples/parity/f1.yaml seed=3
  megatron-md parity validate
  megatron-md parity validate parallel.tensor=2 --nproc-per-node 2
  torchrun --nproc-per-node 4 -m megatron_md parity validate parallel.tensor=2 parallel.pipeline=2

exit codes: 0 done, PASS; 1 a run failed, FAIL; 2 bad input; 75 stopped by a signal
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    keys = f"{EXAMPLES}\nkeys of the YAML file and of section.key=value:\n\n{explain(ParityConfig)}\n"
    summaries = {
        "run": "train one run",
        "sweep": "train every arm with every seed; finished runs are not repeated",
        "plot": "draw a sweep",
        "validate": "train the recorded case on this machine and layout, and compare: PASS or FAIL",
    }
    added = {
        name: actions.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=raw,
            epilog=keys if name in ("run", "sweep") else EXAMPLES,
        )
        for name, text in summaries.items()
    }
    for name in ("run", "sweep"):
        added[name].add_argument("config", metavar="CONFIG.yaml", help="the run or sweep; see the keys below")
    for name in ("run", "sweep", "validate"):
        added[name].add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="keys to change")
    for name in ("run", "validate"):
        added[name].add_argument(
            "--nproc-per-node", type=positive, default=1, metavar="N", help="processes on this machine (1)"
        )
    added["sweep"].add_argument("--workers", type=positive, default=1, metavar="N", help="runs at a time (1)")
    added["plot"].add_argument("directory", type=Path, metavar="DIR", help="run_dir of the sweep")
    added["plot"].add_argument("--output", type=Path, metavar="FILE", help="picture to write; DIR/parity.png")
    reference = added["validate"].add_argument_group("the record")
    reference.add_argument("--reference", type=Path, metavar="FILE", help="record to compare with (the package's own)")
    reference.add_argument(
        "--record", nargs=2, metavar=("CONFIG.yaml", "FILE"), help="instead, write the record of a config's first run"
    )


def run(args: argparse.Namespace) -> int:
    """Run the action that was asked for.

    Raises:
        UserError: bad input.
    """
    return {"run": _run, "sweep": _sweep, "plot": _plot, "validate": _validate}[args.action](args)


def _world_size(args: argparse.Namespace) -> tuple[bool, int]:
    """Whether this is a worker of a job, and how many processes the job has."""
    is_worker = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    return is_worker, int(os.environ["WORLD_SIZE"]) if is_worker else args.nproc_per_node


def _run(args: argparse.Namespace) -> int:
    from megatron_md.errors import EXIT_DONE, EXIT_STOPPED

    config = load_parity_config(args.config, args.overrides)
    is_worker, world = _world_size(args)
    try:
        check_parity(config, world)
    except ConfigError as error:
        raise ConfigError([f"{args.config}: {line}" for line in error.lines]) from None
    if not is_worker and world > 1:
        return _launch(args, args.config, world, "run")
    from megatron_md.parity.experiment import run_experiment

    summary = run_experiment(config, handle_signals=True)
    reached = summary["reached_step"]
    _say_once(
        f"{config.run_dir}: {'goal not reached' if reached is None else f'goal reached at step {reached}'} "
        f"(train {summary['train_accuracy']:.3f}, validation {summary['valid_accuracy']:.3f}, "
        f"largest gap {summary['largest_gap']:.3f})"
    )
    return EXIT_STOPPED if summary["status"] == "stopped" else EXIT_DONE


def _sweep(args: argparse.Namespace) -> int:
    from megatron_md.parity.sweep import run_sweep, table

    rows, failed = run_sweep(load_parity_config(args.config, args.overrides), workers=args.workers)
    if rows:
        say(table(rows).rstrip("\n"), multiline=True)
    return 1 if failed else 0


def _plot(args: argparse.Namespace) -> int:
    from megatron_md.parity.plot import plot_sweep

    output = args.output or args.directory / "parity.png"
    plot_sweep(args.directory, output)
    say(output)
    return 0


def _validate(args: argparse.Namespace) -> int:
    from megatron_md.parity import validate

    if args.record is not None:
        validate.record_reference(load_parity_config(args.record[0], args.overrides), Path(args.record[1]))
        say(args.record[1])
        return 0
    is_worker, world = _world_size(args)
    path = args.reference or validate.default_reference()
    if not is_worker and world > 1:
        validate.layout_config(validate.read_reference(path), args.overrides, world)  # before processes are started
        return _launch(args, str(path), world, "validate", "--reference")
    passed, line = validate.validate(args.overrides, reference=path, world_size=world)
    _say_once(line)
    return 0 if passed else 1


def _launch(args: argparse.Namespace, file: str, world: int, *command: str) -> int:
    from megatron_md.train.launch import launch

    return launch(file, args.overrides, nproc_per_node=world, command=("parity", *command))


def _say_once(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        say(line)

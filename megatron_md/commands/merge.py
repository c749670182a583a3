"""`megatron-md merge`: the mean of checkpoints of a run as a run of its own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from megatron_md.checkpoint.directory import Weights, check_weights
from megatron_md.checkpoint.selection import select
from megatron_md.commands.arguments import positive
from megatron_md.commands.stoppable import stoppable_progress
from megatron_md.errors import UserError
from megatron_md.messages import say

EXAMPLES = """examples:
  megatron-md merge runs/demo --last 4
  megatron-md merge runs/demo --best 4 --output runs/demo-best
  megatron-md merge runs/demo --steps 300,350,400 --weights ema --output runs/demo-averages

The new run has one checkpoint, of weights, that evaluate, generate and convert take as any other; training starts from
it with checkpoint.load=RUN2 checkpoint.load_only=model. Its progress.json names the checkpoints, with their hashes.
"""


def _steps(text: str) -> list[int]:
    return [positive(part) for part in text.split(",") if part]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run_path", type=Path, metavar="RUN", help="run directory")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--last", type=positive, metavar="N", help="the N newest checkpoints")
    which.add_argument("--best", type=positive, metavar="N", help="the N with the lowest val_nelbo, of those measured")
    which.add_argument("--steps", type=_steps, default=[], metavar="A,B", help="the checkpoints of these steps")
    parser.add_argument("--output", type=Path, metavar="RUN2", help="new run directory (RUN-merged)")
    parser.add_argument(
        "--weights", choices=get_args(Weights), default="model", help="the weights, or in each checkpoint their average"
    )


def run(args: argparse.Namespace) -> int:
    """Merge.

    Raises:
        UserError: bad input; nothing has been written then.
    """
    source: Path = args.run_path
    target: Path = args.output or source.with_name(f"{source.resolve().name}-merged")
    if target.exists():
        raise UserError(f"{target}: exists already; name another one by --output, or remove it")
    checkpoints = select(source, last=args.last, best=args.best, steps=args.steps)
    for checkpoint in checkpoints:
        check_weights(checkpoint, args.weights)
    from megatron_md.checkpoint.mean import write_mean

    write_mean(
        checkpoints,
        target,
        weights=args.weights,
        progress=lambda parts: stoppable_progress(parts, f"{source} -> {target}"),
    )
    names = ", ".join(path.name for path in checkpoints)
    say(f"{target}: the mean of {names}; train from it with checkpoint.load={target} checkpoint.load_only=model")
    return 0

"""`megatron-md doctor`: what is installed on this machine, what works, and the way out of what does not."""

from __future__ import annotations

import argparse
import os

from megatron_md.commands.arguments import positive
from megatron_md.errors import EXIT_DONE, EXIT_ERROR, UserError
from megatron_md.messages import say
from megatron_md.run.doctor import Finding, examine

EXAMPLES = """examples:
  megatron-md doctor
  megatron-md doctor --nproc-per-node 4

each line: ok, missing or broken, what was looked at, its version, what it is used for; below it, the way out

exit codes: 0 training runs here, 1 it does not
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--nproc-per-node",
        type=positive,
        metavar="N",
        help="ranks that exchange data and make a step (one per CUDA device; without one, 2)",
    )


def run(args: argparse.Namespace) -> int:
    """Look, try, and print.

    Raises:
        UserError: it was started as a rank of a job.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise UserError("doctor starts ranks of its own: start it once, without torchrun")
    can_train = True
    for finding in examine(args.nproc_per_node):
        show(finding)
        can_train &= finding.state == "ok" or not finding.needed
    say("training runs here" if can_train else "training does not run here")
    return EXIT_DONE if can_train else EXIT_ERROR


def show(finding: Finding) -> None:
    """Print a finding, and the way out below it."""
    say(f"{finding.state:8s}{finding.name:20s}{finding.found}  ({finding.used_for})")
    if finding.way_out:
        say(f"{'':8s}-> {finding.way_out}")

"""`megatron-md plot RUN`: draws RUN/loss.png from RUN/metrics.jsonl."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_md.evaluate.plot import plot_run
from megatron_md.messages import say

EXAMPLES = """examples:
  megatron-md plot runs/demo
  megatron-md plot runs/demo --output demo.svg
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--output", type=Path, metavar="FILE", help="picture to write (.png, .svg, .pdf); RUN/loss.png")


def run(args: argparse.Namespace) -> int:
    """Draw the losses and say where the picture is.

    Raises:
        UserError: the directory holds no metrics.
    """
    output = args.output or args.run_dir / "loss.png"
    plot_run(args.run_dir, output)
    say(output)
    return 0

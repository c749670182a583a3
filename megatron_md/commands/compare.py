"""`megatron-md compare`: do two runs have the same curve, and if not, from which step on and in what?"""

from __future__ import annotations

import argparse

from megatron_md.evaluate.compare import compare_runs
from megatron_md.messages import say

EXAMPLES = """examples:
  megatron-md compare runs/demo runs/other
  megatron-md compare runs/before runs/after --rtol 0    # bit for bit

exit codes: 0 the same within --rtol, 1 not, 2 nothing to compare
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run_a", metavar="RUN_A", help="a run directory")
    parser.add_argument("run_b", metavar="RUN_B", help="another one")
    parser.add_argument("--rtol", type=float, default=1e-5, help="relative tolerance (default: 1e-5)")


def run(args: argparse.Namespace) -> int:
    """Print a line per figure.

    Returns:
        0 if all agree within the tolerance, else 1.
    """
    differences = compare_runs(args.run_a, args.run_b, rtol=args.rtol)
    for key, found in differences.items():
        line = f"{key:15s} {found.steps:6d} steps   largest relative difference {found.largest:.2e}"
        if found.first_step is not None and found.first_pair is not None:
            a, b = found.first_pair
            line += f"   first beyond at step {found.first_step}: {a:.8g} and {b:.8g}"
        say(line)
    same = all(found.first_step is None for found in differences.values())
    say(f"{'the same' if same else 'NOT the same'} within rtol {args.rtol:g}")
    return 0 if same else 1

"""`megatron-md compare`: do two runs have the same curve, and if not, from which step on and in what?"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_md.errors import UserError
from megatron_md.evaluate.plot import read_metrics
from megatron_md.messages import say

EXAMPLES = """examples:
  megatron-md compare runs/demo runs/other
  megatron-md compare runs/before runs/after --rtol 0          (bit for bit)

exit codes: 0 the same within --rtol, 1 not, 2 nothing to compare
"""

KEYS = ("loss", "masked_ce", "grad_norm", "mean_mask_rate", "lr", "val_nelbo")


@dataclass(frozen=True)
class Difference:
    """How one figure of two runs compares over the steps that both have logged.

    Attributes:
        steps: steps compared.
        largest: largest relative difference |a - b| / max(|a|, |b|).
        first_step: first step beyond the tolerance, or None.
        first_pair: the two values there.
    """

    steps: int
    largest: float
    first_step: int | None
    first_pair: tuple[float, float] | None


def relative_difference(a: float, b: float) -> float:
    """|a - b| / max(|a|, |b|); 0 for equal values (two NaN included), infinite where only one is finite."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def compare_runs(run_a: str | Path, run_b: str | Path, *, rtol: float) -> dict[str, Difference]:
    """Compare two runs' metrics, figure by figure.

    Args:
        run_a: a run directory.
        run_b: another one.
        rtol: relative tolerance.

    Raises:
        UserError: a run has no metrics, or they share no step.
    """
    a, b = ({record["step"]: record for record in read_metrics(Path(run))} for run in (run_a, run_b))
    shared = sorted(a.keys() & b.keys())
    if not shared:
        raise UserError(f"{run_a} and {run_b} share no logged step: nothing to compare")
    found = {key: _compare(key, [(step, a[step], b[step]) for step in shared], rtol) for key in KEYS}
    return {key: difference for key, difference in found.items() if difference is not None}


def _compare(key: str, steps: list[tuple[int, dict[str, Any], dict[str, Any]]], rtol: float) -> Difference | None:
    pairs = [(step, _number(a[key]), _number(b[key])) for step, a, b in steps if key in a and key in b]
    if not pairs:
        return None
    differences = [relative_difference(x, y) for _, x, y in pairs]
    beyond = next((pair for pair, difference in zip(pairs, differences, strict=True) if difference > rtol), None)
    return Difference(
        len(pairs), max(differences), beyond[0] if beyond else None, (beyond[1], beyond[2]) if beyond else None
    )


def _number(value: Any) -> float:
    """metrics.jsonl has null for what is not finite."""
    return float(value) if isinstance(value, (int, float)) else math.nan


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

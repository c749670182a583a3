"""Do two runs have the same curve, and if not, from which step on and in what?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_md.errors import UserError
from megatron_md.evaluate.plot import read_metrics

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

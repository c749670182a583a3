"""The figures of a study: what its finished runs left, arm by arm, and how arms differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_md import run_files
from megatron_md.batch import Int64Array
from megatron_md.diffusion.corruption import FloatArray
from megatron_md.errors import UserError
from megatron_md.evaluate.plot import read_metrics
from megatron_md.json_file import as_record, read_json
from megatron_md.sweep.paired import Difference, holm, paired_difference, tokens_to_reach
from megatron_md.sweep.study import TABLE_NAME
from megatron_md.sweep.table import Row, by_arm, read_csv
from megatron_md.train.records import has_overfitted

MAKE_IT = "megatron-md sweep STUDY.yaml"


@dataclass(frozen=True)
class RunFigures:
    """What a finished run left.

    Attributes:
        seed: its seed.
        tokens: processed at each validation.
        nelbo: at each validation; the last one is the final one.
        ce_by_rate: cross-entropy by mask rate at the last validation, nan where there is none.
        row_nelbo_R: final NELBO of each validation row.
        has_overfitted: ended above its lowest NELBO by more than the standard error.
    """

    seed: int
    tokens: list[float]
    nelbo: list[float]
    ce_by_rate: FloatArray
    row_nelbo_R: FloatArray
    has_overfitted: bool

    @property
    def lowest(self) -> tuple[float, float]:
        """The lowest NELBO, and the tokens processed there."""
        return min(zip(self.nelbo, self.tokens, strict=True))


@dataclass(frozen=True)
class ArmFigures:
    """An arm at one point of the grid.

    Attributes:
        name: of the arm.
        runs: one for each seed.
        difference: from the reference arm; None for that itself, and where no seed is shared.
        p_holm: of the difference, corrected for all arms of the point.
        tokens: of each run to the final NELBO of the reference with its seed; inf where it does not get there.
    """

    name: str
    runs: list[RunFigures]
    difference: Difference | None
    p_holm: float | None
    tokens: list[float]


@dataclass(frozen=True)
class _Rows:
    """RUN/validation.json."""

    step: int
    rows: str
    tokens: list[int]
    rate: list[float]
    nelbo: list[float | None]


def read_study(directory: Path, reference: str | None = None) -> dict[str, list[ArmFigures]]:
    """The arms at each point of the grid, the reference first.

    Args:
        directory: of the study.
        reference: the arm that the others are compared with; the first of the table if None.

    Raises:
        UserError: no run is done, there is no such arm, or runs were validated on different rows.
    """
    rows = read_csv(directory / TABLE_NAME, MAKE_IT)
    reference = rows[0]["arm"] if reference is None else reference
    if reference not in (arms := list(by_arm(rows))):
        raise UserError(f"--reference {reference}: no finished run of such an arm; there are {', '.join(arms)}")
    points: dict[str, list[Row]] = {}
    for row in rows:
        points.setdefault(row["point"], []).append(row)
    read = _Reader(directory)
    return {
        point: _arms({arm: [read(row) for row in own] for arm, own in by_arm(of_point).items()}, reference, read)
        for point, of_point in points.items()
    }


class _Reader:
    """Reads runs, and sees to it that all were validated on the same rows."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.rows = directory, ""
        self.tokens_R: Int64Array = np.zeros(0, dtype=np.int64)
        self.rate_R: FloatArray = np.zeros(0)

    def __call__(self, row: Row) -> RunFigures:
        run = self.directory / row["run"]
        way_out = f"remove the run and let `{MAKE_IT}` do it again"
        path = run / run_files.VALIDATION
        found: _Rows = as_record(_Rows, read_json(path, way_out), path, way_out)
        if self.rows and found.rows != self.rows:
            raise UserError(f"{path}: validated on other rows than the runs before it; {way_out}")
        self.rows, self.tokens_R = found.rows, np.array(found.tokens, dtype=np.int64)
        if not all(rate == 1.0 for rate in found.rate if rate):  # a causal model has no masks
            self.rate_R = np.array(found.rate)
        scored = [record for record in read_metrics(run) if isinstance(record.get("val_nelbo"), (int, float))]
        by_rate = [math.nan if value is None else value for value in scored[-1]["val_ce_by_rate"]]
        return RunFigures(
            seed=int(row["seed"]),
            tokens=[record["tokens"] for record in scored],
            nelbo=[record["val_nelbo"] for record in scored],
            ce_by_rate=np.array(by_rate),
            row_nelbo_R=np.array([math.inf if value is None else value for value in found.nelbo]),
            has_overfitted=has_overfitted(scored),
        )


def _arms(arms: dict[str, list[RunFigures]], reference: str, read: _Reader) -> list[ArmFigures]:
    """The arms of one point, the reference first."""
    base = {run.seed: run for run in arms.get(reference, [])}
    names = sorted(arms, key=lambda name: name != reference)
    differences: dict[str, Difference | None] = {}
    for name in names:
        pairs = [(run.row_nelbo_R, base[run.seed].row_nelbo_R) for run in arms[name] if run.seed in base]
        difference_SR = np.array([one - two for one, two in pairs])
        is_comparable = name != reference and len(pairs) > 0 and bool(np.isfinite(difference_SR).all())
        rate_R = read.rate_R if len(read.rate_R) else np.ones(len(read.tokens_R))
        differences[name] = paired_difference(difference_SR, read.tokens_R, rate_R) if is_comparable else None
    compared = {name: found for name, found in differences.items() if found is not None}
    adjusted = dict(zip(compared, holm([found.p_value for found in compared.values()]), strict=True))
    return [
        ArmFigures(
            name,
            arms[name],
            differences[name],
            adjusted.get(name),
            [
                tokens_to_reach(run.tokens, run.nelbo, base[run.seed].nelbo[-1])
                for run in arms[name]
                if run.seed in base
            ],
        )
        for name in names
    ]

"""What a study's finished runs say of its arms: pairs, targets, runs that do not compare."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_md.errors import UserError
from megatron_md.sweep.figures import read_study
from megatron_md.sweep.report import write_report
from megatron_md.sweep.table import write_table

TOKENS = [3, 5, 0, 8]
RATE = [0.25, 0.75, 0.0, 0.5]


def pretend(
    study: Path, arm: str, seed: int, nelbo: list[float], *, point: str = "", rows: str = "a"
) -> dict[str, str]:
    """A run with these values at 100, 200, ... tokens; its rows all have the last one."""
    run = study / f"{arm}{point}" / str(seed)
    run.mkdir(parents=True)
    records = [
        {"step": step, "tokens": 100 * step, "val_nelbo": value, "val_ce_by_rate": [None, value]}
        for step, value in enumerate(nelbo, start=1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    by_row = [None if math.isinf(nelbo[-1]) else nelbo[-1]] * 4
    found = {"step": len(nelbo), "rows": rows, "tokens": TOKENS, "rate": RATE, "nelbo": by_row}
    (run / "validation.json").write_text(json.dumps(found))
    return {"arm": arm, "point": point, "seed": str(seed), "run": str(run.relative_to(study))}


def test_arms_are_paired_by_seed_at_each_point(tmp_path: Path) -> None:
    rows = [
        pretend(tmp_path, "other", 1, [5.0, 3.0, 2.5]),
        pretend(tmp_path, "other", 2, [5.0, 4.0, 3.5]),
        pretend(tmp_path, "other", 3, [5.0, 4.0, 1.0]),
        pretend(tmp_path, "base", 1, [5.0, 4.0, 3.0]),
        pretend(tmp_path, "base", 2, [5.0, 4.0, 3.0]),
        pretend(tmp_path, "other", 1, [2.0], point="steps 9"),
    ]
    write_table(tmp_path / "results.csv", rows)
    points = read_study(tmp_path, "base")
    base, other = points[""]
    assert (base.name, base.difference, base.p_holm) == ("base", None, None)
    assert base.tokens == pytest.approx([300, 300]), "it is its own target"
    assert other.difference is not None and other.difference.mean == pytest.approx((-0.5 + 0.5) / 2)
    assert other.difference.seeds == 2 and len(other.runs) == 3, "a seed without a partner is reported, not compared"
    assert other.tokens == pytest.approx([200, math.inf]), "the first gets to 3.0 early, the second does not"
    assert np.array_equal(other.runs[0].ce_by_rate, [math.nan, 2.5], equal_nan=True)
    (alone,) = points["steps 9"]
    assert alone.difference is None and alone.tokens == []
    text = write_report(tmp_path, "base")
    assert "| other | 3 | 2.5000 (1.0000 to 3.5000) | +0.0000 [" in text and "## steps 9" in text
    assert "| other | 1 | 2.0000 | | |  |" in text and "lowest" not in text
    assert read_study(tmp_path)[""][0].name == "other", "the first arm, unless told otherwise"


def test_a_run_without_finite_figures_is_not_compared(tmp_path: Path) -> None:
    rows = [pretend(tmp_path, "base", 1, [3.0]), pretend(tmp_path, "broken", 1, [3.0, math.inf])]
    write_table(tmp_path / "results.csv", rows)
    base, broken = read_study(tmp_path)[""]
    assert broken.difference is None and base.runs[0].nelbo == [3.0]


def test_the_report_tells_where_runs_that_overfitted_were_best(tmp_path: Path) -> None:
    rows = [
        pretend(tmp_path, "base", 1, [3.0, 2.9]),
        pretend(tmp_path, "few tokens", 1, [2.0, 1.5, 4.0]),
        pretend(tmp_path, "few tokens", 2, [2.0, 1.7, 1.7]),
    ]
    write_table(tmp_path / "results.csv", rows)
    head, _, base, few = write_report(tmp_path).splitlines()
    assert head.endswith("| tokens | lowest |")
    assert base.endswith("| 2.9000 at 0.00M |") and few.endswith("| 1.6000 at 0.00M |")
    (_, found) = read_study(tmp_path)[""]
    assert [run.lowest for run in found.runs] == [(1.5, 200), (1.7, 200)]
    assert [run.has_overfitted for run in found.runs] == [True, False]


def test_what_does_not_compare_is_refused(tmp_path: Path) -> None:
    rows = [pretend(tmp_path, "base", 1, [3.0]), pretend(tmp_path, "other", 1, [3.0], rows="b")]
    write_table(tmp_path / "results.csv", rows)
    with pytest.raises(UserError, match=r"other/1/validation.json: validated on other rows than the runs before it"):
        read_study(tmp_path)
    with pytest.raises(UserError, match="--reference nobody: no finished run of such an arm; there are base, other"):
        read_study(tmp_path, "nobody")
    (tmp_path / "base/1/validation.json").unlink()
    with pytest.raises(UserError, match=r"validation.json: .*remove the run and let .* do it again"):
        read_study(tmp_path)

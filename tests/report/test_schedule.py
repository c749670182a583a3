"""The drawn law of the mask rate is a law, over the whole run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_md.config import config_from_mapping, resolve
from megatron_md.report.schedule import BINS, described


def described_as(**objective: Any) -> Any:
    return described(resolve(config_from_mapping({"model": {"vocab": 9}, "objective": objective})))


@pytest.mark.parametrize("spec", ["uniform:0.45,0.55", "beta:2,3", "point:0", "point:1", "logit_normal:0,1", "bell"])
def test_a_law_that_stays_has_one_density_of_area_one(spec: str) -> None:
    _, found = described_as(mask_schedule=spec)
    assert list(found) == ["whole run"] and found["whole run"].sum() / BINS == pytest.approx(1.0)


def test_a_law_that_changes_has_three() -> None:
    anneal = {"name": "anneal", "from": "uniform:0,0.5", "to": "uniform:0.5,1", "over": 1}
    label, found = described_as(mask_schedule=anneal)
    assert list(found) == ["start", "middle", "end"] and "uniform:0,0.5" in label
    assert np.allclose(found["start"][:100], 2.0) and np.allclose(found["start"][100:], 0.0)
    assert np.allclose(found["middle"], 1.0) and np.allclose(found["end"][100:], 2.0)


def test_pairs_have_the_law_of_both_rows() -> None:
    _, found = described_as(mask_schedule="uniform:0,0.5", pairs="complementary")
    assert np.allclose(found["whole run"], 1.0)


@pytest.mark.parametrize(
    "objective", [{"mask_schedule": "theirs:1"}, {"mask_schedule": "knots:/no/such"}, {"name": "autoregressive"}]
)
def test_what_cannot_be_drawn(objective: dict[str, Any]) -> None:
    assert described_as(**objective)[1] is None
    assert described(None)[1] is None

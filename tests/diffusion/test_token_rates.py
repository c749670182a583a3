"""Rates of single tokens: the identity changes nothing, every token counts once, bad rates are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.batch import BatchPosition, CleanBatch, CorruptedBatch
from megatron_md.config import Config, ObjectiveConfig, config_from_mapping
from megatron_md.diffusion.objective import build_objective
from megatron_md.diffusion.token_rates import parse_token_rate, rates_of_tokens, register_token_rate
from megatron_md.errors import UserError
from megatron_md.run.check import check_config

ROWS, LENGTH, VOCAB, MASK = 4000, 12, 50, 3
POSITION = {"name": "position", "strength": 0.5}


@register_token_rate("test identity")
class Identity:
    def __call__(self, tokens_BL: Any, rate_B: Any) -> Any:
        return np.broadcast_to(rate_B[:, None], tokens_BL.shape)


@register_token_rate("test broken")
class Broken:
    def __init__(self, shift: float) -> None:
        self.shift = shift

    def __call__(self, tokens_BL: Any, rate_B: Any) -> Any:
        return np.broadcast_to(rate_B[:, None] + self.shift, tokens_BL.shape)


def rows(first: int = 0, stop: int = ROWS) -> CleanBatch:
    index = np.arange(first, stop)
    tokens = np.stack([np.random.default_rng(int(g)).integers(4, VOCAB, LENGTH) for g in index])
    is_maskable = np.arange(LENGTH)[None] < (LENGTH - index % 3)[:, None]
    return CleanBatch(tokens, is_maskable, index, BatchPosition(0, ROWS))


def corrupted(batch: CleanBatch, **keys: Any) -> CorruptedBatch:
    return build_objective(ObjectiveConfig(**keys), seed=7, mask_token_id=MASK).corrupt(batch)


@pytest.mark.parametrize("keys", [{}, {"pairs": "antithetic"}, {"normalise": "sequences"}], ids=str)
def test_the_identity_is_no_token_rate_to_the_bit(keys: dict[str, Any]) -> None:
    plain, same = corrupted(rows(), **keys), corrupted(rows(), token_rate={"name": "test identity"}, **keys)
    for name in ("tokens_BL", "positions_M", "targets_M", "weights_M", "mask_rate_B"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(same, name))
    assert plain.denominator == same.denominator


@pytest.mark.parametrize("schedule", ["uniform:0,1", "uniform:0.45,0.55"])
def test_tokens_are_masked_at_their_rates_and_count_once(schedule: str, tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps([0, 0, 0, 0, *range(1, VOCAB - 3)]))
    batch = rows()
    for spec in (POSITION, {"name": "frequency", "strength": 0.4, "counts": str(counts)}):
        found = corrupted(batch, token_rate=spec, mask_schedule=schedule, min_mask_rate=0.02)
        rate = parse_token_rate(spec)
        assert rate is not None
        rate_BL = rates_of_tokens(rate, batch.tokens_BL, found.mask_rate_B.astype(np.float64), 0.02)
        is_masked_N = np.zeros(ROWS * LENGTH, dtype=bool)
        is_masked_N[found.positions_M] = True
        weight_N = np.zeros(ROWS * LENGTH)
        weight_N[found.positions_M] = found.weights_M
        np.testing.assert_allclose(found.weights_M, 1.0 / rate_BL.reshape(-1)[found.positions_M], rtol=1e-5)
        maskable_BL, is_masked_BL = batch.is_maskable_BL, is_masked_N.reshape(ROWS, LENGTH)
        assert not is_masked_BL[~maskable_BL].any()
        for place in range(LENGTH):
            own = maskable_BL[:, place]
            expected, spread = rate_BL[own, place], np.sqrt(own.sum()) / 2
            assert abs(is_masked_BL[own, place].sum() - expected.sum()) < 5 * spread
            assert weight_N.reshape(ROWS, LENGTH)[own, place].mean() == pytest.approx(1.0, abs=0.25)
        # Tokens that cost log V each cost log V in the mean, as in every loss here.
        assert weight_N.sum() / found.denominator == pytest.approx(1.0, abs=0.05)


def test_where_a_strength_leads() -> None:
    rate = parse_token_rate(POSITION)
    assert rate is not None
    (found_L,) = rate(np.full((1, 5), 9), np.array([0.5]))
    np.testing.assert_allclose(found_L, 0.5 ** np.exp([0.5, 0.25, 0.0, -0.25, -0.5]))
    assert rate(np.full((2, 5), 9), np.array([0.0, 1.0])).tolist() == [[0.0] * 5, [1.0] * 5]


def test_frequent_tokens_are_masked_less(tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text("[0, 1, 10, 100]")
    rate = parse_token_rate({"name": "frequency", "strength": 1, "counts": str(counts)})
    assert rate is not None
    (found_L,) = rate(np.array([[0, 1, 2, 3]]), np.array([0.5]))
    assert found_L[0] == found_L[1] > found_L[2] > found_L[3] > 0.0
    log_power = np.log(np.log(found_L) / np.log(0.5))  # the strength times the standardised log counts
    assert np.average(log_power, weights=[1, 1, 10, 100]) == pytest.approx(0.0, abs=1e-12)
    assert np.average(log_power**2, weights=[1, 1, 10, 100]) == pytest.approx(1.0)
    with pytest.raises(UserError, match=r"counts.json: has counts of 4 tokens, and a row has token 4"):
        rate(np.array([[4]]), np.array([0.5]))


def test_a_micro_batch_sees_what_the_global_batch_sees() -> None:
    whole = corrupted(rows(0, 20), token_rate=POSITION)
    parts = [corrupted(rows(first, first + 10), token_rate=POSITION) for first in (0, 10)]
    np.testing.assert_array_equal(np.concatenate([part.tokens_BL for part in parts]), whole.tokens_BL)
    np.testing.assert_array_equal(np.concatenate([part.weights_M for part in parts]), whole.weights_M)


def test_plain_means_stay_plain() -> None:
    found = corrupted(rows(), token_rate=POSITION, weight="none", normalise="masked")
    assert set(found.weights_M.tolist()) == {1.0} and found.denominator == len(found.positions_M)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"name": "positon", "strength": 1}, "did you mean 'position'"),
        ({"strength": 1}, "needs a `name`"),
        ({"name": "position"}, "missing a required argument: 'strength'"),
        ({"name": "position", "strength": 1, "x": 2}, "unexpected keyword argument 'x'"),
        ({"name": "position", "strength": 0}, "strength must not be 0 and at most 3 either way"),
        ({"name": "position", "strength": "much"}, "strength must be a finite number"),
        ({"name": "frequency", "strength": 1, "counts": "nowhere.json"}, "nowhere.json"),
        ({"name": "frequency", "strength": 1, "counts": "{bad}"}, "must be a list of the count of each token"),
    ],
)
def test_bad_token_rates_are_one_line_before_the_start(spec: dict[str, Any], text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('["a"]')
    if "counts" in spec:
        spec = {**spec, "counts": spec["counts"].format(bad=tmp_path / "bad.json")}
    with pytest.raises(UserError) as stop:
        check_config(config_from_mapping({"objective": {"token_rate": spec}}), 1, corpora=False)
    (line,) = str(stop.value).splitlines()
    assert line.startswith("objective.token_rate") and text in line


@pytest.mark.parametrize("shift", [0.7, -0.7, float("nan")])
def test_rates_outside_of_the_unit_interval_are_refused(shift: float) -> None:
    with pytest.raises(UserError, match=r"objective\.token_rate: Broken gave rates of shape"):
        corrupted(rows(), token_rate={"name": "test broken", "shift": shift})


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "autoregressive"}, {"pairs": "complementary"}, {"importance": True}, {"weight": "realised"},
        {"weight": "none"}, {"normalise": "masked"},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_together_is_refused(keys: dict[str, Any]) -> None:
    config = Config(objective=ObjectiveConfig(token_rate=POSITION))
    check_config(config, 1, corpora=False)
    with pytest.raises(UserError, match=r"objective\.token_rate does not go with"):
        check_config(replace(config, objective=replace(config.objective, **keys)), 1, corpora=False)

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_md.batch import BatchPosition, CleanBatch, CorruptedBatch
from megatron_md.config import ObjectiveConfig
from megatron_md.diffusion._schedule_base import _registry as registered
from megatron_md.diffusion.corruption import shift_right
from megatron_md.diffusion.objective import Objective, build_objective, register_objective
from megatron_md.diffusion.schedule import PRESETS, parse_schedule

MASK, VOCAB = 96, 97
SCHEDULES: list[Any] = [
    "uniform:0.45,0.55",
    "uniform:0,1",
    "beta:2,3",
    "point:0.3",
    {
        "name": "curriculum",
        "stages": [{"until": 0.5, "schedule": "uniform:0,1"}, {"until": 1, "schedule": "point:0.4"}],
    },
]


def build(**keys: Any) -> Objective:
    return build_objective(ObjectiveConfig(**keys), seed=11, mask_token_id=MASK, eos_token_id=0)


def rows(first: int, count: int, length: int = 40, *, progress: float = 0.25) -> CleanBatch:
    """A global batch whose rows have prompts and padding of different lengths."""
    generator = np.random.default_rng(first)
    tokens_BL = generator.integers(0, MASK, (count, length))
    at_L = np.arange(length)
    is_maskable_BL = (at_L >= generator.integers(0, 6, (count, 1))) & (at_L < generator.integers(30, 41, (count, 1)))
    return CleanBatch(tokens_BL, is_maskable_BL, np.arange(first, first + count), BatchPosition(first, count, progress))


def split(batch: CleanBatch, order: list[list[int]]) -> list[CleanBatch]:
    """Micro-batches made of the given rows."""
    return [
        CleanBatch(batch.tokens_BL[r], batch.is_maskable_BL[r], batch.sample_index_B[r], batch.position) for r in order
    ]


def loss_of_uniform_model(parts: list[CorruptedBatch]) -> float:
    total = sum(math.log(VOCAB) * float(part.weights_M.sum(dtype=np.float64)) for part in parts)
    return total / sum(part.denominator for part in parts)


@pytest.mark.parametrize("name", ["masked_diffusion", "masked_diffusion_sft", "autoregressive"])
@pytest.mark.parametrize("weight", ["elbo", "none", "realised"])
def test_corruption_does_not_depend_on_the_layout(name: str, weight: Any) -> None:
    objective = build(name=name, mask_schedule="uniform:0.1,0.9", weight=weight)
    batch = rows(64, 8)
    whole = objective.corrupt(batch)
    length = batch.tokens_BL.shape[1]
    for order in ([[r] for r in range(8)], [[0, 1], [2, 3], [4, 5], [6, 7]], [[7, 2, 5, 0], [1, 3, 4, 6]]):
        parts = [objective.corrupt(part) for part in split(batch, order)]
        for part, chosen in zip(parts, order, strict=True):
            np.testing.assert_array_equal(part.tokens_BL, whole.tokens_BL[chosen])
            np.testing.assert_array_equal(part.mask_rate_B, whole.mask_rate_B[chosen])
            for position, target, weight_m in zip(part.positions_M, part.targets_M, part.weights_M, strict=True):
                there = np.searchsorted(whole.positions_M, chosen[position // length] * length + position % length)
                assert (target, weight_m) == (whole.targets_M[there], whole.weights_M[there])
        assert sum(len(part.positions_M) for part in parts) == len(whole.positions_M)
        assert sum(part.denominator for part in parts) == whole.denominator


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_masked_tokens_are_replaced_and_predicted_and_nothing_else(schedule: Any) -> None:
    batch = rows(0, 16)
    corrupted = build(mask_schedule=schedule).corrupt(batch)
    is_masked_BL = corrupted.tokens_BL == MASK
    np.testing.assert_array_equal(np.flatnonzero(is_masked_BL), corrupted.positions_M)
    np.testing.assert_array_equal(batch.tokens_BL[is_masked_BL], corrupted.targets_M)
    np.testing.assert_array_equal(batch.tokens_BL[~is_masked_BL], corrupted.tokens_BL[~is_masked_BL])
    assert not np.any(is_masked_BL & ~batch.is_maskable_BL)
    assert corrupted.denominator == batch.is_maskable_BL.sum()
    np.testing.assert_allclose(corrupted.weights_M, 1 / corrupted.mask_rate_B[corrupted.positions_M // 40], rtol=1e-6)


def test_masks_are_nested_across_schedules() -> None:
    batch = rows(0, 32)
    low = build(mask_schedule="uniform:0.2,0.3").corrupt(batch)
    high = build(mask_schedule="uniform:0.6,0.9").corrupt(batch)
    assert set(low.positions_M.tolist()) < set(high.positions_M.tolist())


def test_rates_are_stratified_over_the_global_batch_and_floored() -> None:
    corrupted = build(mask_schedule="uniform:0,1", min_mask_rate=0.1).corrupt(rows(0, 50))
    strata = np.sort(corrupted.mask_rate_B)
    assert np.count_nonzero(strata == np.float32(0.1)) == 5
    np.testing.assert_array_equal(np.floor(strata[5:] * 50 + 1e-4), np.arange(5, 50))


@pytest.mark.parametrize(
    "keys",
    [
        {"weight": "realised"},
        {"weight": "realised", "normalise": "sequences"},
        {"weight": "none", "normalise": "masked"},
        {"name": "autoregressive"},
        {"name": "autoregressive", "normalise": "sequences"},
        {"name": "masked_diffusion_sft", "weight": "realised", "normalise": None},
    ],
    ids=str,
)
def test_uniform_model_has_loss_log_v_in_every_batch(keys: dict[str, Any]) -> None:
    objective = build(mask_schedule="uniform:0,1", **keys)
    parts = [objective.corrupt(part) for part in split(rows(0, 8), [[0, 3, 1], [2, 4, 5, 6, 7]])]
    assert loss_of_uniform_model(parts) == pytest.approx(math.log(VOCAB), rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("weight", ["elbo", "none"])
def test_uniform_model_has_loss_log_v_on_average(schedule: Any, weight: Any) -> None:
    objective = build(mask_schedule=schedule, weight=weight, min_mask_rate=0.02)
    losses = [loss_of_uniform_model([objective.corrupt(rows(64 * k, 64))]) / math.log(VOCAB) for k in range(40)]
    assert abs(np.mean(losses) - 1.0) < 4 * np.std(losses, ddof=1) / math.sqrt(40)
    assert np.std(losses) < 0.05


def test_importance_divides_by_the_density_of_the_rate_as_drawn() -> None:
    components = [{"weight": 1, "schedule": "uniform:0,0.05"}, {"weight": 1, "schedule": "uniform:0,1"}]
    mixture = {"name": "mixture", "components": components}
    corrupted = build(mask_schedule=mixture, importance=True, min_mask_rate=0.1).corrupt(rows(0, 400))
    weight_of_row = dict(zip((corrupted.positions_M // 40).tolist(), corrupted.weights_M.tolist(), strict=True))
    at_floor = [weight for row, weight in weight_of_row.items() if corrupted.mask_rate_B[row] == np.float32(0.1)]
    # The density is 10.5 below 0.05 and 0.5 above, and rates below 0.1 mask as 0.1.
    assert {round(weight, 4) for weight in at_floor} == {round(10 / 10.5, 4), round(10 / 0.5, 4)}


def test_corruption_follows_the_curriculum_and_the_seed() -> None:
    objective = build(mask_schedule=SCHEDULES[-1])
    late = objective.corrupt(rows(0, 8, progress=0.75))
    assert np.all(late.mask_rate_B == np.float32(0.4))
    assert np.ptp(objective.corrupt(rows(0, 8)).mask_rate_B) > 0.5
    other = build_objective(ObjectiveConfig(mask_schedule="point:0.4"), seed=12, mask_token_id=MASK)
    assert not np.array_equal(other.corrupt(rows(0, 8)).positions_M, late.positions_M)


def test_reduce_gives_sums_that_add_up_over_micro_batches() -> None:
    objective = build(mask_schedule="uniform:0.1,0.9")
    batch = rows(0, 8)
    whole = objective.corrupt(batch)
    nll_M = torch.rand(len(whole.positions_M), generator=torch.Generator().manual_seed(0))
    metrics = objective.reduce(nll_M, whole)
    assert set(metrics) == {"masked_ce", "mean_mask_rate"}
    total, count = metrics["masked_ce"]
    assert float(total) == pytest.approx(float(nll_M.sum())) and count == len(whole.positions_M)
    assert metrics["mean_mask_rate"] == (pytest.approx(float(whole.mask_rate_B.sum())), 8.0)
    first, second = (objective.corrupt(part) for part in split(batch, [[0, 1, 2], [3, 4, 5, 6, 7]]))
    cut = len(first.positions_M)
    for name, (total, count) in metrics.items():
        halves = [objective.reduce(nll_M[:cut], first)[name], objective.reduce(nll_M[cut:], second)[name]]
        assert float(halves[0][0]) + float(halves[1][0]) == pytest.approx(float(total), rel=1e-6)
        assert halves[0][1] + halves[1][1] == count


def test_a_micro_batch_without_any_masked_position() -> None:
    batch = rows(0, 2)
    empty = replace(batch, is_maskable_BL=np.zeros_like(batch.is_maskable_BL))
    for name in ("masked_diffusion", "masked_diffusion_sft", "autoregressive"):
        objective = build(name=name)
        corrupted = objective.corrupt(empty)
        assert corrupted.denominator == 0 and corrupted.positions_M.shape == corrupted.weights_M.shape == (0,)
        total, count = objective.reduce(torch.zeros(0), corrupted)["masked_ce"]
        assert float(total) == 0.0 and count == 0.0


def test_autoregressive_scores_the_same_tokens_from_the_left() -> None:
    batch = rows(0, 4)
    objective = build(name="autoregressive")
    corrupted = objective.corrupt(batch)
    assert objective.causal and not build().causal
    np.testing.assert_array_equal(corrupted.tokens_BL[:, 0], np.full(4, MASK))
    np.testing.assert_array_equal(corrupted.tokens_BL[:, 1:], batch.tokens_BL[:, :-1])
    np.testing.assert_array_equal(corrupted.targets_M, batch.tokens_BL[batch.is_maskable_BL])
    np.testing.assert_array_equal(corrupted.positions_M, np.flatnonzero(batch.is_maskable_BL))
    assert np.all(corrupted.weights_M == 1.0) and corrupted.denominator == batch.is_maskable_BL.sum()
    assert shift_right(np.array([[5, 6, 7]]), 1).tolist() == [[1, 5, 6]]


def test_autoregressive_begins_every_document_anew_where_they_are_kept_apart() -> None:
    batch = CleanBatch(
        np.array([[5, 6, 7, 8], [9, 10, 11, 12]]),
        np.ones((2, 4), dtype=bool),
        np.arange(2),
        BatchPosition(0, 2),
        cu_seqlens=[np.array([0, 2, 3, 4], dtype=np.int32), np.array([0, 4], dtype=np.int32)],
    )
    apart = build_objective(ObjectiveConfig(name="autoregressive"), seed=0, mask_token_id=MASK, within_document=True)
    assert apart.corrupt(batch).tokens_BL.tolist() == [[MASK, 5, MASK, MASK], [MASK, 9, 10, 11]]
    together = build(name="autoregressive").corrupt(batch)
    assert together.tokens_BL.tolist() == [[MASK, 5, 6, 7], [MASK, 9, 10, 11]]
    np.testing.assert_array_equal(apart.corrupt(batch).targets_M, together.targets_M)


def test_fine_tuning_counts_every_answer_once() -> None:
    batch = rows(0, 8)
    batch.is_maskable_BL[3] = False
    corrupted = build(name="masked_diffusion_sft", mask_schedule="uniform:0.3,0.7", normalise=None).corrupt(batch)
    assert corrupted.denominator == 7
    n_M = batch.is_maskable_BL.sum(axis=1)[corrupted.positions_M // 40]
    t_M = corrupted.mask_rate_B[corrupted.positions_M // 40]
    np.testing.assert_allclose(corrupted.weights_M, 1 / (t_M * n_M), rtol=1e-6)
    # What the config says goes first.
    explicit = build(name="masked_diffusion_sft", normalise="maskable").corrupt(batch)
    assert explicit.denominator == batch.is_maskable_BL.sum()


def test_built_in_objectives_follow_the_protocol() -> None:
    for name in ("masked_diffusion", "masked_diffusion_sft", "autoregressive"):
        objective = build(name=name)
        assert isinstance(objective, Objective) and objective.name == name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "masked_difusion"}, "unknown objective 'masked_difusion'; did you mean 'masked_diffusion'"),
        ({"options": {"colour": 1}}, r"objective\.options of 'masked_diffusion': got an unexpected keyword .*colour"),
        ({"mask_schedule": "uniform:1,0"}, "lo must be below hi"),
        ({"mask_schedule": "uniform:0.2,0.8", "importance": True}, "importance needs a mask schedule with positive"),
    ],
)
def test_bad_configs_are_refused_in_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(**keys)
    assert "\n" not in str(caught.value)


def test_third_party_objectives_get_their_options() -> None:
    @register_objective("test_objective")
    class Other:
        name, causal = "test_objective", False

        def __init__(self, context: Any, *, strength: float) -> None:
            self.strength, self.eos_token_id = strength, context.eos_token_id

    objective: Any = build(name="test_objective", options={"strength": 2.0})
    assert objective.strength == 2.0 and objective.eos_token_id == 0
    with pytest.raises(ValueError, match="missing a required argument: 'strength'"):
        build(name="test_objective")


# Padded rows, each a dialogue: prompt, answer, padding. The same two dialogues and a third, packed into two rows.
PADDED = CleanBatch(
    np.arange(5, 21).reshape(2, 8),
    np.array([[0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1]], dtype=bool),
    np.arange(2),
    BatchPosition(0, 2),
    cu_seqlens=[np.array([0, 5, 8], dtype=np.int32), np.array([0, 8], dtype=np.int32)],
)
PACKED = replace(
    PADDED,
    is_maskable_BL=np.array([[0, 0, 1, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1, 1]], dtype=bool),
    cu_seqlens=[np.array([0, 5, 8], dtype=np.int32), np.array([0, 8], dtype=np.int32)],
    counts_documents=True,
)


@pytest.mark.parametrize(
    ("batch", "normalise", "weight_of_place", "denominator"),
    [
        # LLaDA: sum over answers of (sum of CE / t) / answer length, divided by the number of answers.
        (PADDED, "sequences", [[0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0], [0, *[1 / 7] * 7]], 2),
        (PADDED, "maskable", [[0, 0, 1, 1, 1, 0, 0, 0], [0, *[1] * 7]], 10),
        (PACKED, "sequences", [[0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 1], [0, *[1 / 7] * 7]], 3),
        (PACKED, "maskable", [[0, 0, 1, 1, 1, 0, 0, 1], [0, *[1] * 7]], 11),
    ],
)
def test_answers_count_once_or_by_their_tokens(
    batch: CleanBatch, normalise: Any, weight_of_place: list[list[float]], denominator: int
) -> None:
    # At t = 0.5 (1 / t = 2) some answer tokens are masked; at t = 1 all are.
    for rate, scale in (("point:0.5", 2.0), ("point:1", 1.0)):
        corrupted = build(name="masked_diffusion_sft", mask_schedule=rate, normalise=normalise).corrupt(batch)
        expected = scale * np.array(weight_of_place).reshape(-1)[corrupted.positions_M]
        np.testing.assert_allclose(corrupted.weights_M, expected, rtol=1e-6)
        assert corrupted.denominator == denominator
    assert len(corrupted.positions_M) == batch.is_maskable_BL.sum()
    causal = build(name="autoregressive", normalise=normalise).corrupt(batch)
    np.testing.assert_allclose(causal.weights_M, np.array(weight_of_place).reshape(-1)[causal.positions_M], rtol=1e-6)
    assert causal.denominator == denominator


@pytest.mark.parametrize("weight", ["elbo", "none", "realised"])
@pytest.mark.parametrize("normalise", ["maskable", "masked", "sequences"])
def test_packed_dialogues_count_as_they_would_alone(weight: Any, normalise: Any) -> None:
    """The loss of a uniform model, as that of any other, is a mean over dialogues however they share rows."""
    schedule = "point:0.5"
    objective = build(name="masked_diffusion_sft", mask_schedule=schedule, weight=weight, normalise=normalise)
    packed = objective.corrupt(PACKED)
    pieces = []  # each dialogue as a row of its own, with the masks that it has in the packed one
    for row, cuts in enumerate(PACKED.cu_seqlens or []):
        for begin, end in pairwise(cuts):
            is_here_BL = np.zeros((2, 8), dtype=bool)
            is_here_BL[row, begin:end] = PACKED.is_maskable_BL[row, begin:end]
            part = replace(PACKED, is_maskable_BL=is_here_BL, counts_documents=False)
            pieces.append(objective.corrupt(part))
    positions = np.concatenate([piece.positions_M for piece in pieces])
    np.testing.assert_array_equal(np.sort(positions), packed.positions_M)
    weights = np.concatenate([piece.weights_M for piece in pieces])[np.argsort(positions)]
    np.testing.assert_array_equal(packed.weights_M, weights)
    assert packed.denominator == sum(piece.denominator for piece in pieces)


SPECS: dict[str, Any] = {
    "uniform": "uniform:0,1",
    "beta": "beta:2,3",
    "point": "point:1",
    "knots": {"name": "knots", "points": [[0.1, 0.0], [0.3, 2.0], [1.0, 1.0]]},
    "mixture": {
        "name": "mixture",
        "components": [{"weight": 0.5, "schedule": "uniform:0,1"}, {"weight": 0.5, "schedule": "point:0.9"}],
    },
    "curriculum": SCHEDULES[-1],
    "anneal": {"name": "anneal", "from": "point:1", "to": "beta:2,3", "over": [0.2, 0.9]},
    "truncated_normal": "truncated_normal:0.9,0.2",
    "logit_normal": "logit_normal:0,1",
}


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(SPECS)),
    st.sampled_from(["masked_diffusion", "masked_diffusion_sft"]),
    st.integers(0, 2**62),
    st.floats(0, 1),
    st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=4),
)
def test_prompts_and_padding_are_never_masked(
    schedule: str, name: str, first: int, progress: float, maskable: list[list[bool]]
) -> None:
    is_maskable_BL = np.array(maskable)
    count = len(maskable)
    tokens_BL = np.random.default_rng(first % 1000).integers(0, MASK, is_maskable_BL.shape)
    position = BatchPosition(first, count, progress)
    batch = CleanBatch(tokens_BL, is_maskable_BL, np.arange(first, first + count), position)
    corrupted = build(name=name, mask_schedule=SPECS[schedule]).corrupt(batch)
    np.testing.assert_array_equal(corrupted.tokens_BL[~is_maskable_BL], tokens_BL[~is_maskable_BL])
    assert is_maskable_BL.reshape(-1)[corrupted.positions_M].all()
    np.testing.assert_array_equal(np.flatnonzero(corrupted.tokens_BL == MASK), corrupted.positions_M)


def test_that_is_all_registered_schedules() -> None:
    assert {type(parse_schedule(spec)).__module__.split(".")[0] for spec in SPECS.values()} == {"megatron_md"}
    names = set(registered.names()) - PRESETS.keys()  # which are names for some of these
    own = [name for name in names if registered.get(name).__module__.startswith("megatron_md.")]
    assert set(own) == set(SPECS)

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from megatron_md.diffusion.schedule import parse_schedule
from megatron_md.diffusion.weighting import Weighting
from tests.diffusion.peer_vectors import vector
from tests.diffusion.toy_posterior import ToyPosterior

MIXTURE: dict[str, Any] = {
    "name": "mixture",
    "components": [{"weight": 0.8, "schedule": "uniform:0.45,0.55"}, {"weight": 0.2, "schedule": "uniform:0,1"}],
}
WITH_ATOM: dict[str, Any] = {
    "name": "mixture",
    "components": [{"weight": 0.5, "schedule": "point:0.15"}, {"weight": 0.5, "schedule": "uniform:0,1"}],
}
KNOTS: dict[str, Any] = {"name": "knots", "points": [[0, 0.2], [0.5, 2.0], [1, 0.2]]}
FULL = ["uniform:0,1", "beta:0.5,0.9", MIXTURE, WITH_ATOM, KNOTS]
WINDOWS = ["uniform:0.45,0.55", "uniform:0,0.2", "point:0.15", "beta:2,3"]
WEIGHTS = ["elbo", "none", "realised"]
NORMALISE = ["maskable", "masked", "sequences"]
STRATA = (np.arange(6000) + 0.5) / 6000


def binomial(n: int, s: np.ndarray) -> np.ndarray:
    """P(m masked of n) at each rate: [T, n + 1]."""
    return np.stack([math.comb(n, m) * s**m * (1.0 - s) ** (n - m) for m in range(n + 1)], axis=1)


def expected_sum_and_count(weighting: Weighting, n: int, progress: float = 0.0) -> tuple[float, float]:
    """E[w m] and E[d] of a row with n maskable tokens, over the rate (strata) and over m (enumerated)."""
    t = weighting.schedule.sample(STRATA, progress)
    chance = binomial(n, weighting.floored(t))
    total = count = 0.0
    for m in range(n + 1):
        masked_T, maskable_T = np.full(len(t), m), np.full(len(t), n)
        weights_T = weighting.row_weights(t, masked_T, maskable_T, progress)
        total += float(np.mean(chance[:, m] * weights_T * m))
        count += float(np.mean(chance[:, m])) * weighting.denominator(masked_T[:1], maskable_T[:1])
    return total, count


@pytest.mark.parametrize(("weight", "normalise"), list(product(WEIGHTS, NORMALISE)))
@pytest.mark.parametrize("importance", [False, True])
def test_uniform_model_has_loss_log_v(weight: Any, normalise: Any, importance: bool) -> None:
    for spec in FULL if importance else FULL + WINDOWS:
        weighting = Weighting(parse_schedule(spec), weight=weight, normalise=normalise, importance=importance)
        for n in (1, 3, 12):
            total, count = expected_sum_and_count(weighting, n)
            assert total / count == pytest.approx(1.0, abs=1e-4), (spec, n)


@pytest.mark.parametrize("spec", FULL + WINDOWS, ids=str)
def test_mean_of_weight_times_rate_is_one(spec: Any) -> None:
    schedule = parse_schedule(spec)
    t = schedule.sample(STRATA)
    n = np.full(len(t), 1000)
    for weight in ("elbo", "none"):
        weighting = Weighting(schedule, weight=weight)  # type: ignore[arg-type]
        # Neither weight looks at the number masked, and E[is_masked] is the floored rate.
        weights = weighting.row_weights(t, n, n, 0.0)
        assert np.mean(weights * weighting.floored(t)) == pytest.approx(1.0, abs=1e-6)


def test_constants_follow_a_curriculum() -> None:
    stages = [{"until": 0.5, "schedule": "uniform:0.1,0.3"}, {"until": 1.0, "schedule": "uniform:0.5,1"}]
    weighting = Weighting(parse_schedule({"name": "curriculum", "stages": stages}), weight="none")
    ones = np.ones(1, dtype=np.int64)
    assert weighting.row_weights(np.array([0.2]), ones, ones, 0.4)[0] == pytest.approx(1 / 0.2)
    assert weighting.row_weights(np.array([0.6]), ones, ones, 0.6)[0] == pytest.approx(1 / 0.75)
    for progress in (0.4, 0.6):
        total, count = expected_sum_and_count(weighting, 5, progress)
        assert total / count == pytest.approx(1.0, abs=1e-6)


def toy_losses(weighting: Weighting, toy: ToyPosterior) -> np.ndarray:
    """Expected loss per token of every sequence: over the rate (strata) and all sets of masked positions."""
    t = weighting.schedule.sample(STRATA)
    s = weighting.floored(t)
    n = toy.tokens_XN.shape[1]
    total_X, count = np.zeros(len(toy.law_X)), 0.0
    for index, is_masked_N in enumerate(toy.is_masked_SN):
        m = int(is_masked_N.sum())
        chance = s**m * (1.0 - s) ** (n - m)
        masked_T, maskable_T = np.full(len(t), m), np.full(len(t), n)
        weights_T = weighting.row_weights(t, masked_T, maskable_T, 0.0)
        total_X += float(np.mean(chance * weights_T)) * toy.sum_XS[:, index]
        count += float(np.mean(chance)) * weighting.denominator(masked_T[:1], maskable_T[:1])
    return total_X / count


@pytest.mark.parametrize("weight", ["elbo", "realised"])
@pytest.mark.parametrize("spec", FULL, ids=str)
def test_exact_denoiser_reaches_its_nll_on_the_full_range(spec: Any, weight: Any) -> None:
    toy = ToyPosterior(3, 4)
    weighting = Weighting(parse_schedule(spec), weight=weight, importance=True, min_mask_rate=1e-7)
    np.testing.assert_allclose(toy_losses(weighting, toy), toy.nll_X / 4, rtol=2e-4)


def test_windows_are_biased_without_importance() -> None:
    toy = ToyPosterior(3, 4)
    losses = toy_losses(Weighting(parse_schedule("uniform:0.8,0.9")), toy)
    assert toy.law_X @ losses > 1.05 * (toy.law_X @ toy.nll_X / 4)


def test_elbo_weighs_by_the_floored_rate() -> None:
    weighting = Weighting(parse_schedule("uniform:0,1"), min_mask_rate=0.01)
    ones = np.ones(3, dtype=np.int64)
    np.testing.assert_allclose(
        weighting.row_weights(np.array([0.0, 0.005, 0.5]), ones, ones, 0.0), [100, 100, 2], rtol=1e-12
    )


def test_realised_weight_and_denominators() -> None:
    schedule = parse_schedule("uniform:0,1")
    t, m, n = np.array([0.1, 0.5, 0.2]), np.array([0, 4, 1]), np.array([7, 8, 0])
    realised = Weighting(schedule, weight="realised")
    assert realised.row_weights(t, m, n, 0.0)[1] == pytest.approx(2.0)
    assert realised.denominator(m[:2], n[:2]) == 8
    assert Weighting(schedule).denominator(m[:2], n[:2]) == 15
    assert Weighting(schedule, normalise="masked").denominator(m[:2], n[:2]) == 4
    assert Weighting(schedule, normalise="sequences").denominator(m[:2], n[:2]) == 2
    assert Weighting(schedule, normalise="sequences", weight="realised").denominator(m[:2], n[:2]) == 1
    # A row of padding counts nowhere.
    empty = np.zeros(1, dtype=np.int64)
    assert all(Weighting(schedule, normalise=name).denominator(empty, empty) == 0 for name in NORMALISE)  # type: ignore[arg-type]


def test_mean_over_masked_tokens_has_weight_one() -> None:
    weighting = Weighting(parse_schedule("uniform:0,0.2"), weight="none", normalise="masked")
    n = np.full(4, 21)
    np.testing.assert_array_equal(weighting.row_weights(np.linspace(0, 0.2, 4), n // 3, n, 0.0), np.ones(4))


@pytest.mark.parametrize("spec", [*WINDOWS, "uniform:0.001,1"], ids=str)
def test_importance_is_refused_without_full_support(spec: Any) -> None:
    with pytest.raises(ValueError, match=r"objective\.importance needs .* add a uniform floor with a mixture"):
        Weighting(parse_schedule(spec), importance=True)


def test_bad_choices_are_refused() -> None:
    schedule = parse_schedule("uniform:0,1")
    with pytest.raises(ValueError, match=r"objective\.weight: unknown 'elb'; did you mean 'elbo'"):
        Weighting(schedule, weight="elb")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"objective\.normalise: unknown 'token'"):
        Weighting(schedule, normalise="token")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_mask_rate must lie strictly between 0 and 1"):
        Weighting(schedule, min_mask_rate=0.0)


def peer_loss(case: dict[str, Any], is_maskable_BL: np.ndarray, **keys: Any) -> tuple[np.ndarray, float]:
    """Our weighted losses at the masked positions of a peer's batch, and our loss."""
    inputs = case["inputs"]
    logits_BLV = torch.tensor(inputs["logits"], dtype=torch.float64)
    targets_BL = torch.tensor(inputs["x0"])
    nll_BL = -logits_BLV.log_softmax(-1).gather(2, targets_BL[..., None])[..., 0].numpy()
    weighting = Weighting(parse_schedule("uniform:0.001,1"), **keys)
    t_B = weighting.schedule.sample(np.array(inputs["u_t"]))
    is_masked_BL = (np.array(inputs["u_mask"]) < t_B[:, None]) & is_maskable_BL
    masked_B, maskable_B = is_masked_BL.sum(axis=1), is_maskable_BL.sum(axis=1)
    weighted_BL = nll_BL * weighting.row_weights(t_B, masked_B, maskable_B, 0.0)[:, None]
    losses = weighted_BL[is_masked_BL]
    return losses, float(losses.sum() / weighting.denominator(masked_B, maskable_B))


def test_pretraining_loss_of_llada() -> None:
    case = vector("llada_pretrain_loss")
    losses, loss = peer_loss(case, np.ones((2, 4), dtype=bool))
    np.testing.assert_allclose(losses, case["expected"]["token_loss_over_p"], atol=3 * case["tol"])
    assert loss == pytest.approx(case["expected"]["loss"], abs=case["tol"])


def test_fine_tuning_loss_of_automodel() -> None:
    case = vector("automodel_mdlm_loss")
    _, loss = peer_loss(case, np.array(case["inputs"]["loss_mask"], dtype=bool))
    assert loss == pytest.approx(case["expected"], abs=case["tol"])


def test_fine_tuning_loss_of_llada_by_hand() -> None:
    """Per answer, from the same peer's losses: (6.2322783 / 3 + (1.5095969 + 0.17020199) / 2) / 2 answers."""
    case = vector("automodel_mdlm_loss")
    is_answer_BL = np.array(case["inputs"]["loss_mask"], dtype=bool)
    _, loss = peer_loss(case, is_answer_BL, normalise="sequences")
    assert loss == pytest.approx(1.4586628, abs=1e-6)


def test_weights_of_mdlm_and_dllm_are_importance_weights() -> None:
    # In their time tau the NELBO weight is (dt/dtau) / t; here dt/dtau is 1 / density(t).
    linear = vector("dllm_alpha_schedulers")
    tau = np.array(linear["inputs"]["t"])
    weighting = Weighting(parse_schedule("uniform:0,1"), importance=True)
    n = np.full(len(tau), 5)
    ours = weighting.row_weights(tau, n, n, 0.0)
    np.testing.assert_allclose(1 / ours, 1 / np.array(linear["expected"]["linear"]["weight"]) - 1e-6, atol=1e-6)
    mdlm = vector("mdlm_noise_schedules")
    expected = mdlm["expected"]["loglinear"]
    schedule = parse_schedule("uniform:0,0.999")
    t = schedule.sample(np.array(mdlm["inputs"]["t"]))
    np.testing.assert_allclose(t, expected["move_chance"], atol=1e-6)
    np.testing.assert_allclose(1 / (t * schedule.density(t)), expected["nelbo_weight"], rtol=mdlm["tol"])

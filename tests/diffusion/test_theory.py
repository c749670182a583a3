"""The theory: every figure of the paper's tables, against closed forms, enumeration and Monte Carlo."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from megatron_md.diffusion.schedule import FloatArray, Point, parse_schedule
from megatron_md.diffusion.theory import (
    EffectiveLoss,
    effective_loss,
    identifiability_bound,
    in_signal_regime,
    moment,
    ngram_signal,
    optimal_mask_rate,
    partition_by_regime,
    sample_complexity_upper,
    schedule_identifiability_bound,
    schedule_signal_probability,
    signal_optimal_rate,
    signal_optimal_upper,
    signal_probability,
)

# k: t1 of the best window [0, t1], P_S there; best rate, P_S there; t1 of the least samples (arXiv 2601.22450).
TABLE = {
    1: (0.7500, 0.3750, 0.5000, 0.5000, None),
    2: (0.5375, 0.3449, 0.3333, 0.4444, 0.4417),
    3: (0.4156, 0.3318, 0.2500, 0.4219, 0.3281),
    4: (0.3381, 0.3245, 0.2000, 0.4096, 0.2606),
    5: (0.2848, 0.3198, 0.1667, 0.4019, 0.2160),
    6: (0.2459, 0.3165, 0.1429, 0.3966, 0.1844),
    8: (0.1931, 0.3123, 0.1111, 0.3897, 0.1426),
    10: (0.1590, 0.3096, 0.0909, 0.3855, 0.1163),
}
WIKITEXT = {2: 0.7427, 3: 0.2063, 4: 0.0401, 5: 0.0084, 6: 0.0024}
MIXTURE: dict[str, Any] = {
    "name": "mixture",
    "components": [{"weight": 3, "schedule": "uniform:0,0.3"}, {"weight": 1, "schedule": "beta:2,5"}],
}
KNOTS: dict[str, Any] = {"name": "knots", "points": [[0, 0], [0.2, 3], [0.9, 1]]}
CURRICULUM: dict[str, Any] = {
    "name": "curriculum",
    "stages": [{"until": 0.5, "schedule": "uniform:0,0.2"}, {"until": 1, "schedule": MIXTURE}],
}
SCHEDULES = ["uniform:0,1", "uniform:0.45,0.55", "beta:2,5", "beta:0.5,0.7", "point:0.15", MIXTURE, KNOTS, CURRICULUM]


@pytest.mark.parametrize("k", TABLE)
def test_the_table_of_optimal_rates(k: int) -> None:
    upper, at_upper, rate, at_rate, samples = TABLE[k]
    assert round(signal_optimal_upper(k), 4) == upper
    assert round(signal_probability(k, 0.0, signal_optimal_upper(k)), 4) == at_upper
    assert round(signal_optimal_rate(k), 4) == rate
    assert round(schedule_signal_probability(Point(signal_optimal_rate(k)), k), 4) == at_rate
    if samples is not None:
        assert round(sample_complexity_upper(k), 4) == samples


def test_the_bound_of_samples_in_the_text() -> None:
    assert identifiability_bound(20, 6, 0.0, 0.2, 0.05) == pytest.approx(926.13, abs=0.01)
    assert identifiability_bound(20, 6, 0.0, 0.2459, 0.05) == pytest.approx(958.60, abs=0.01)


def test_predicted_rates_of_wikitext() -> None:
    assert round(optimal_mask_rate(WIKITEXT, power=1), 3) == 0.463
    assert round(optimal_mask_rate(WIKITEXT, power=2), 3) == 0.481


@pytest.mark.parametrize("k", [1, 2, 6, 25, 400])
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (0.0, 0.2), (0.45, 0.55), (0.1, 0.9)])
def test_window_probability_has_its_antiderivative(k: int, t0: float, t1: float) -> None:
    def antiderivative(t: float) -> float:
        return (k + 1) / (k + 2) * (1 - t) ** (k + 2) - (1 - t) ** (k + 1)

    exact = (antiderivative(t1) - antiderivative(t0)) / (t1 - t0)
    assert signal_probability(k, t0, t1) == pytest.approx(exact, rel=1e-9, abs=1e-13)


def test_narrow_window_is_its_point() -> None:
    for k in (1, 6, 300):
        narrow = signal_probability(k, 0.3, 0.3 + 1e-12)
        assert narrow == pytest.approx(schedule_signal_probability(Point(0.3), k), rel=1e-9)


@pytest.mark.parametrize("k", [1, 2, 5, 6, 40])
def test_optima_are_optima(k: int) -> None:
    grid = np.linspace(1e-4, 1.0, 1001)
    best = signal_optimal_upper(k)
    assert signal_probability(k, 0.0, best) >= max(signal_probability(k, 0.0, t1) for t1 in grid)
    rate = signal_optimal_rate(k)
    assert schedule_signal_probability(Point(rate), k) >= max(schedule_signal_probability(Point(t), k) for t in grid)
    # No window, whatever its lower edge, needs fewer samples.
    least = identifiability_bound(64, k, 0.0, sample_complexity_upper(k), 0.1)
    edges = np.linspace(0.0, 1.0, 41)
    others = [identifiability_bound(64, k, t0, t1, 0.1) for t0, t1 in itertools.combinations(edges, 2)]
    assert least <= min(others) * (1 + 1e-12)


def test_one_bit_windows_of_the_same_mean_need_the_same_samples() -> None:
    assert sample_complexity_upper(1) == pytest.approx(2 / 3)
    bounds = [identifiability_bound(8, 1, 1 / 3 - half, 1 / 3 + half, 0.1) for half in (0.05, 0.2, 1 / 3)]
    assert bounds == pytest.approx([bounds[0]] * 3)


def test_best_signal_falls_to_one_over_e() -> None:
    values = [schedule_signal_probability(Point(signal_optimal_rate(k)), k) for k in (1, 10, 100, 10_000)]
    assert values == sorted(values, reverse=True) and values[-1] == pytest.approx(1 / math.e, rel=1e-4)


@pytest.mark.parametrize("spec", SCHEDULES, ids=str)
@pytest.mark.parametrize(("a", "b"), [(1, 0), (0, 6), (1, 6), (2, 1)])
@pytest.mark.parametrize("progress", [0.0, 0.7])
def test_moments_agree_with_a_fine_sum_over_strata(spec: Any, a: int, b: int, progress: float) -> None:
    schedule = parse_schedule(spec)
    t = schedule.sample((np.arange(5_000) + 0.5) / 5_000, progress)
    assert moment(schedule, a, b, progress) == pytest.approx(np.mean(t**a * (1 - t) ** b), abs=2e-6)


def test_beta_one_one_is_uniform() -> None:
    for k in (1, 6):
        uniform = schedule_signal_probability(parse_schedule("uniform:0,1"), k)
        assert schedule_signal_probability(parse_schedule("beta:1,1"), k) == pytest.approx(uniform, rel=1e-12)
        assert uniform == pytest.approx(1 / (k + 2), rel=1e-12)


@pytest.mark.parametrize("spec", SCHEDULES, ids=str)
@pytest.mark.parametrize("k", [1, 6])
def test_drawn_masks_are_in_the_signal_regime_as_often_as_said(spec: Any, k: int) -> None:
    schedule, random, rows, n = parse_schedule(spec), np.random.default_rng(0), 20_000, 9
    rate_B = schedule.sample(random.random(rows))
    is_masked_BL = random.random((rows, n + 1)) < rate_B[:, None]
    in_parity_L = np.zeros(n + 1, dtype=np.bool_)
    in_parity_L[random.permutation(n)[:k]] = in_parity_L[n] = True
    expected = schedule_signal_probability(schedule, k)
    found = np.mean(in_signal_regime(is_masked_BL, in_parity_L))
    assert abs(found - expected) < 3.5 * math.sqrt(expected * (1 - expected) / rows)


# The decomposition: n = 4, S = {0, 2}, all 16 inputs, all 32 masks, at their probabilities under two mask rates.
N, SECRET, RATES = 4, (0, 2), (0.25, 0.6)
IN_PARITY = np.array([True, False, True, False, True])


def enumeration(inputs: Any = None) -> tuple[np.ndarray, np.ndarray, FloatArray, FloatArray]:
    """(tokens_BL, is_masked_BL, mask_rate_B, probability_B) over inputs x masks x rates."""
    inputs = list(itertools.product([-1, 1], repeat=N)) if inputs is None else inputs
    tokens, masks, rates, probabilities = [], [], [], []
    for x, is_masked, t in itertools.product(inputs, itertools.product([False, True], repeat=N + 1), RATES):
        tokens.append([*x, math.prod(x[i] for i in SECRET)])
        masks.append(is_masked)
        rates.append(t)
        masked = sum(is_masked)
        probabilities.append(t**masked * (1 - t) ** (N + 1 - masked) / (len(inputs) * len(RATES)))
    assert sum(probabilities) == pytest.approx(1.0)
    return np.array(tokens), np.array(masks), np.array(rates), np.array(probabilities)


def random_model(tokens_BL: np.ndarray, is_masked_BL: np.ndarray, outputs: int, seed: int) -> FloatArray:
    """A function of what is visible alone: a table over the 3^5 contents of the masked row; [B] or [B, outputs]."""
    code = np.where(is_masked_BL, 0, tokens_BL + 2) % 4 @ (4 ** np.arange(N + 1))
    table = np.random.default_rng(seed).uniform(0.02, 0.98, (4 ** (N + 1), outputs))
    return table[code] if outputs > 1 else table[code, 0]


def plain_loss(predictions: FloatArray, tokens_BL: Any, is_masked_BL: Any, rate_B: Any, loss: str) -> FloatArray:
    """(1/t) sum over masked i of loss(f, x'_i), row by row, as it is defined."""
    f_BL = np.broadcast_to(predictions.reshape(len(tokens_BL), -1), tokens_BL.shape)
    if loss == "squared":
        loss_BL = 0.5 * (f_BL - tokens_BL) ** 2
    else:
        loss_BL = -np.log(np.where(tokens_BL == 1, f_BL, 1 - f_BL))
    return np.asarray(np.sum(loss_BL * is_masked_BL, axis=1) / rate_B)


def both(outputs: int, seed: int, loss: Any, inputs: Any = None) -> tuple[EffectiveLoss, float]:
    """(the decomposition, the loss itself) of a random model."""
    tokens_BL, is_masked_BL, rate_B, probability_B = enumeration(inputs)
    f = random_model(tokens_BL, is_masked_BL, outputs, seed)
    parts = effective_loss(f, tokens_BL, is_masked_BL, IN_PARITY, rate_B, loss=loss, probability_B=probability_B)
    return parts, float(np.sum(plain_loss(f, tokens_BL, is_masked_BL, rate_B, loss) * probability_B))


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("seed", range(5))
def test_decomposition_is_exact_for_one_shared_output(loss: Any, seed: int) -> None:
    parts, total = both(1, seed, loss)
    assert parts.signal > 0.0 and parts.noise > 0.0
    assert parts.total == pytest.approx(total, abs=1e-13)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_decomposition_is_not_exact_otherwise(loss: Any) -> None:
    parts, total = both(N + 1, 0, loss)
    assert abs(parts.total - total) > 1e-3  # an output for each position
    some = [x for number, x in enumerate(itertools.product([-1, 1], repeat=N)) if number in (0, 3, 5, 6, 9)]
    parts, total = both(1, 0, loss, some)
    assert abs(parts.total - total) > 1e-3  # a finite sample of x


def test_an_output_for_each_position_undercuts_the_constant() -> None:
    tokens_BL, is_masked_BL, rate_B, probability_B = enumeration()
    is_answer_BL = is_masked_BL & IN_PARITY & in_signal_regime(is_masked_BL, IN_PARITY)[:, None]
    f_BL = np.where(is_answer_BL, tokens_BL, 0.0)
    parts = effective_loss(f_BL, tokens_BL, is_masked_BL, IN_PARITY, rate_B, probability_B=probability_B)
    total = np.sum(plain_loss(f_BL, tokens_BL, is_masked_BL, rate_B, "squared") * probability_B)
    assert total < parts.constant - 0.01 < parts.total


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_the_best_shared_output_pays_the_constant_alone(loss: Any) -> None:
    tokens_BL, is_masked_BL, rate_B, probability_B = enumeration()
    is_signal_B = in_signal_regime(is_masked_BL, IN_PARITY)
    hidden_B = np.sum(tokens_BL * (is_masked_BL & IN_PARITY), axis=1)
    best_B = np.where(is_signal_B, hidden_B / np.maximum(is_masked_BL.sum(axis=1), 1), 0.0)
    if loss == "cross_entropy":
        best_B = 0.5 * (1 + best_B)
    parts = effective_loss(best_B, tokens_BL, is_masked_BL, IN_PARITY, rate_B, loss=loss, probability_B=probability_B)
    assert parts.signal == pytest.approx(0.0, abs=1e-15) and parts.noise == pytest.approx(0.0, abs=1e-15)
    assert parts.constant > 0.0


@pytest.mark.parametrize("outputs", [1, N + 1])
def test_partition_by_regime_sums_to_the_loss_of_any_model(outputs: int) -> None:
    tokens_BL, is_masked_BL, rate_B, probability_B = enumeration()
    loss_B = plain_loss(random_model(tokens_BL, is_masked_BL, outputs, 1), tokens_BL, is_masked_BL, rate_B, "squared")
    signal, noise = partition_by_regime(loss_B, is_masked_BL, IN_PARITY, probability_B)
    assert signal > 0.0 and noise > 0.0
    assert signal + noise == pytest.approx(np.sum(loss_B * probability_B), rel=1e-13)
    # A loss of 1 everywhere leaves the probability of the regimes.
    share, _ = partition_by_regime(np.ones(len(loss_B)), is_masked_BL, IN_PARITY, probability_B)
    assert share == pytest.approx(np.mean([schedule_signal_probability(Point(t), len(SECRET)) for t in RATES]))


def test_effective_loss_refuses_what_it_cannot_mean() -> None:
    tokens_BL, is_masked_BL, in_parity_L = np.array([[1, -1]]), np.array([[True, False]]), np.array([True, True])
    rate_B = np.array([0.5])
    with pytest.raises(ValueError, match="tokens of k-parity are -1 and 1"):
        effective_loss(np.zeros(1), np.array([[0, 1]]), is_masked_BL, in_parity_L, rate_B)
    with pytest.raises(ValueError, match="mask rate 0"):
        effective_loss(np.zeros(1), tokens_BL, is_masked_BL, in_parity_L, np.zeros(1))
    with pytest.raises(ValueError, match="between 0 and 1"):
        effective_loss(np.full(1, -0.5), tokens_BL, is_masked_BL, in_parity_L, rate_B, loss="cross_entropy")


@pytest.mark.parametrize("power", [1, 2])
def test_one_order_has_its_peak_at_one_over_it(power: int) -> None:
    for order in range(1, 12):
        assert optimal_mask_rate({order: 0.3}, power) == pytest.approx(1 / order, abs=1e-6)
    t = np.linspace(0, 1, 100_001)
    assert optimal_mask_rate(WIKITEXT, power) == pytest.approx(t[np.argmax(ngram_signal(t, WIKITEXT, power))], abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: signal_probability(0, 0.0, 0.5), "at least one position"),
        (lambda: signal_optimal_upper(-1), "at least one position"),
        (lambda: sample_complexity_upper(0), "at least one position"),
        (lambda: signal_probability(3, 0.5, 0.5), "0 <= t0 < t1 <= 1, got t0 = 0.5 and t1 = 0.5"),
        (lambda: signal_probability(3, 0.6, 0.5), "0 <= t0 < t1 <= 1"),
        (lambda: signal_probability(3, -0.1, 0.5), "0 <= t0 < t1 <= 1"),
        (lambda: signal_probability(3, 0.5, 1.1), "0 <= t0 < t1 <= 1"),
        (lambda: signal_probability(3, 0.5, math.nan), "0 <= t0 < t1 <= 1"),
        (lambda: identifiability_bound(5, 6, 0.0, 0.2, 0.05), "k = 6 of n = 5"),
        (lambda: identifiability_bound(20, 6, 0.0, 0.2, 0.0), "delta"),
        (lambda: identifiability_bound(20, 6, 0.0, 0.2, 1.0), "delta"),
        (lambda: optimal_mask_rate({2: 1.0}, power=3), "power must be 1"),
        (lambda: optimal_mask_rate({}), "one of them positive"),
        (lambda: optimal_mask_rate({2: 0.0}), "one of them positive"),
        (lambda: optimal_mask_rate({2: 1.0, 3: -0.1}), "non-negative"),
        (lambda: optimal_mask_rate({0: 1.0}), "order of an n-gram"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_masks_that_never_help_need_infinitely_many_samples() -> None:
    assert schedule_identifiability_bound(Point(0.0), 20, 6, 0.05) == math.inf
    assert schedule_identifiability_bound(Point(1.0), 20, 6, 0.05) == math.inf


def test_theory_needs_no_torch() -> None:
    code = (
        "import sys, megatron_md.diffusion.theory, megatron_md.diffusion.ngrams;"
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

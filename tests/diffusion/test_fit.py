"""The statistics recover what was planted, the parity circuit peaks where theory says, the densities are optimal."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_md.batch import BatchPosition, CleanBatch
from megatron_md.diffusion import fit
from megatron_md.diffusion.fit import BINS, FLOOR, GradientProducts, Moments
from megatron_md.diffusion.pairs import draw_masks, draw_rates
from megatron_md.diffusion.schedule import Knots, Uniform

ROWS, WIDTH = 4, 50


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean gradients [A, D] and noise per coordinate [A] of a quadratic's rows."""
    random = np.random.default_rng(seed)
    t = (np.arange(BINS) + 0.5) / BINS
    common, own = random.normal(size=WIDTH), random.normal(size=(BINS, WIDTH))
    return np.exp(-(((t - 0.4) / 0.2) ** 2))[:, None] * common + 0.1 * own, 0.5 + 2.0 * (t - 0.6) ** 2


def products(groups: int, seed: int = 0) -> GradientProducts:
    mean_AD, noise_A = planted()
    random = np.random.default_rng((7, seed))
    noise_AKD = random.normal(size=(BINS, groups, WIDTH)) * noise_A[:, None, None] / np.sqrt(ROWS)
    return GradientProducts.of((mean_AD[:, None] + noise_AKD).astype(np.float32), ROWS)


def truth() -> Moments:
    mean_AD, noise_A = planted()
    return Moments(mean_AD @ mean_AD.mean(axis=0), np.sum(mean_AD**2, axis=1) + WIDTH * noise_A**2)


def test_planted_signal_and_second_moment_are_recovered() -> None:
    found, exact = products(256).moments(), truth()
    np.testing.assert_allclose(found.signal_A, exact.signal_A, atol=0.02 * np.abs(exact.signal_A).max())
    np.testing.assert_allclose(found.moment_A, exact.moment_A, rtol=0.05)
    density = fit.aligned_density(found)
    np.testing.assert_allclose(density, fit.aligned_density(exact), atol=0.01)
    assert abs(int(density.argmax()) - 6) <= 1  # the signal was planted about t = 0.4, the least noise at 0.6


def test_few_groups_are_without_bias_and_know_their_error() -> None:
    draws = [products(8, seed) for seed in range(200)]
    signal_XA = np.array([draw.moments().signal_A for draw in draws])
    moment_XA = np.array([draw.moments().moment_A for draw in draws])
    for values_XA, exact_A in ((signal_XA, truth().signal_A), (moment_XA, truth().moment_A)):
        error_A = values_XA.std(axis=0) / np.sqrt(len(draws))
        assert np.all(np.abs(values_XA.mean(axis=0) - exact_A) < 4.5 * error_A)
    told_A = np.mean([draw.jackknife(lambda own: own.moments().signal_A) ** 2 for draw in draws], axis=0) ** 0.5
    np.testing.assert_allclose(told_A, signal_XA.std(axis=0), rtol=0.35)


def test_a_group_with_itself_is_no_signal() -> None:
    noise = np.random.default_rng(0).normal(size=(BINS, 64, WIDTH))
    found = GradientProducts.of(noise, 1)
    signal_A, error_A = found.moments().signal_A, found.jackknife(lambda own: own.moments().signal_A)
    assert np.all(np.abs(signal_A) < 5.0 * error_A)
    np.testing.assert_allclose(found.moments().moment_A, WIDTH, rtol=0.2)


def test_the_parity_circuit_peaks_at_one_seventh() -> None:
    """(20, 6) parity: at a masked position the circuit has a gradient where the six others of its group are seen.

    Its mean is (1 - t)^6 and its second moment under weights 1/t is (1 - t)^6 / t, so that s / sqrt(v) is
    (1 - t)^3 sqrt(t), largest at t = 1/7.
    """
    rows, members = 60_000, 7
    found = np.empty((BINS, rows, 1))
    index = np.arange(rows)
    tokens = np.zeros((rows, 21), dtype=np.int64)
    batch = CleanBatch(tokens, np.ones_like(tokens, dtype=bool), index, BatchPosition(0, rows))
    for a in range(BINS):
        rate_B = np.maximum(draw_rates(1, batch, Uniform(a / BINS, (a + 1) / BINS), "none", 1e-3), 1e-3)
        is_masked = draw_masks(1, batch, rate_B, "none")[:, :members]
        found[a, :, 0] = (is_masked.sum(axis=1) == 1) / rate_B / members
    groups = 300
    means_AKD = found.reshape(BINS, groups, -1, 1).mean(axis=2)
    density = fit.aligned_density(GradientProducts.of(means_AKD, rows // groups).moments())
    assert int(density.argmax()) == int(BINS / 7)
    t_AX = np.maximum((np.arange(BINS)[:, None] + (np.arange(5000) + 0.5) / 5000) / BINS, 1e-3)
    seen_AX = (1.0 - t_AX) ** (members - 1)
    shape = seen_AX.mean(axis=1) / np.sqrt((seen_AX / t_AX).mean(axis=1))
    np.testing.assert_allclose(density, (1.0 - FLOOR) * shape / shape.sum() + FLOOR / BINS, atol=0.01)


def test_gains() -> None:
    moments, uniform = truth(), np.full(BINS, 1.0 / BINS)
    assert fit.aligned_gain(moments, uniform) == pytest.approx(1.0) == fit.variance_gain(moments, uniform)
    for a in (0, 6):
        assert fit.window_gains(moments)[a] == pytest.approx(fit.aligned_gain(moments, np.eye(BINS)[a]))
    assert 1.0 < fit.aligned_gain(moments, fit.aligned_density(moments)) < fit.window_gains(moments).max()
    # Without its floor the variance-optimal density is the best one there is (Cauchy and Schwarz).
    best = np.sqrt(moments.moment_A) / np.sqrt(moments.moment_A).sum()
    random = np.random.default_rng(0)
    others = [random.dirichlet(np.full(BINS, 20.0)) for _ in range(50)]
    assert all(fit.variance_gain(moments, other) < fit.variance_gain(moments, best) for other in others)
    np.testing.assert_allclose(fit.variance_density(moments), (1.0 - FLOOR) * best + FLOOR / BINS)


def test_a_gain_is_measured_on_groups_that_were_not_fitted() -> None:
    for groups in (fit.LEAST_GROUPS, 64):
        few = products(groups)
        error = few.jackknife(lambda own: own.held_out_gain(fit.aligned_density, fit.aligned_gain))
        assert 0.0 < error < 10.0 / groups
    noise = GradientProducts.of(np.random.default_rng(3).normal(size=(BINS, 12, WIDTH)) + 0.2, 1)
    fitted_and_measured = fit.aligned_gain(noise.moments(), fit.aligned_density(noise.moments()))
    assert noise.held_out_gain(fit.aligned_density, fit.aligned_gain) < fitted_and_measured


def test_no_signal_and_no_gradient_give_the_uniform_density() -> None:
    nothing = Moments(np.full(BINS, -1.0), np.zeros(BINS))
    np.testing.assert_array_equal(fit.aligned_density(nothing), np.full(BINS, 1.0 / BINS))
    np.testing.assert_allclose(fit.variance_density(nothing), 1.0 / BINS)


def test_knots_are_a_schedule_with_the_bins_mass() -> None:
    chance_A = fit.aligned_density(truth())
    schedule = Knots(tuple(fit.knots(chance_A)))
    assert schedule.has_full_support()
    found_A = np.diff(schedule.cdf(np.arange(BINS + 1) / BINS))
    np.testing.assert_allclose(found_A, chance_A, atol=0.006)

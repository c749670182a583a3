"""What a mask schedule does to (n, k)-parity and to n-grams: signal probability, optimal rates, sample bounds.

The task: x uniform in {-1, 1}^n, a secret set S of k positions, the label y = product of x_i over S. The sequence is
x' = (x_1..x_n, y), and S' is S with the label's position. A mask is in the *signal regime* when it covers exactly one
position of S' (which the visible rest of S' determines), otherwise in the *noise regime*. Formulas: Huang &
Mirzasoleiman, arXiv 2601.22450. The integrals over a window are polynomials' and come out exactly, those over a beta
density are quotients of beta functions; other schedules go through `MaskSchedule.expectation`. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_md.diffusion._schedule_base import first_true
from megatron_md.diffusion.incomplete_beta import log_beta
from megatron_md.diffusion.schedule import Beta, FloatArray, MaskSchedule, Mixture, Staged, Uniform
from megatron_md.errors import UserError

BoolArray = npt.NDArray[np.bool_]
Loss = Literal["squared", "cross_entropy"]

_MOST_NODES = 256


def moment(schedule: MaskSchedule, a: int, b: int, progress: float = 0.0) -> float:
    """E[t^a (1-t)^b] for t from a schedule.

    Args:
        schedule: distribution of the mask rate.
        a: power of t, >= 0.
        b: power of 1 - t, >= 0.
        progress: share of the run's tokens seen so far, for a curriculum.
    """
    if isinstance(schedule, Staged):
        return moment(schedule.stage(progress), a, b, progress)
    if isinstance(schedule, Mixture):
        parts = (moment(component, a, b, progress) for component in schedule.components)
        return math.fsum(weight * part for weight, part in zip(schedule.weights, parts, strict=True))
    if isinstance(schedule, Beta):
        return math.exp(log_beta(schedule.a + a, schedule.b + b) - log_beta(schedule.a, schedule.b))
    if isinstance(schedule, Uniform):
        # m nodes of Gauss-Legendre integrate polynomials of degree 2m - 1 exactly, without the cancellation of the
        # antiderivative in a narrow window.
        nodes, weights = _gauss_legendre(min((a + b) // 2 + 1, _MOST_NODES))
        t = schedule.lo + (schedule.hi - schedule.lo) * nodes
        return float(np.sum(weights * t**a * (1.0 - t) ** b))
    return schedule.expectation(lambda t: t**a * (1.0 - t) ** b, progress)


@lru_cache(maxsize=64)
def _gauss_legendre(count: int) -> tuple[FloatArray, FloatArray]:
    """Nodes in [0, 1] and weights that sum to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return 0.5 * (nodes + 1.0), 0.5 * weights


def schedule_signal_probability(schedule: MaskSchedule, k: int, progress: float = 0.0) -> float:
    """P_S = (k+1) E[t (1-t)^k]: the probability that a mask of this schedule is in the signal regime.

    Args:
        schedule: distribution of the mask rate.
        k: size of the secret set, >= 1.
        progress: share of the run's tokens seen so far, for a curriculum.

    Raises:
        UserError: k is below 1.
    """
    _check_k(k)
    return (k + 1) * moment(schedule, 1, k, progress)


def signal_probability(k: int, t0: float, t1: float) -> float:
    """P_S = (k+1)/(t1-t0) * integral of t (1-t)^k over [t0, t1], for t uniform on that window.

    With s = 1 - t this is [(k+1)/(k+2) s^(k+2) - s^(k+1)], taken from s = 1 - t0 to 1 - t1, divided by t1 - t0.

    Raises:
        UserError: k is below 1, or not 0 <= t0 < t1 <= 1 (for one rate t: `schedule_signal_probability(Point(t), k)`).
    """
    return schedule_signal_probability(_window(t0, t1), k)


def signal_optimal_rate(k: int) -> float:
    """The rate 1/(k+1) that maximises (k+1) t (1-t)^k, and so P_S over all schedules (as an atom there).

    P_S is (k/(k+1))^k there, which falls to 1/e as k grows.

    Raises:
        UserError: k is below 1.
    """
    _check_k(k)
    return 1.0 / (k + 1)


def signal_optimal_upper(k: int) -> float:
    """The t1 that maximises P_S over windows [0, t1].

    There the value at the edge equals the mean over the window: t1^2 (1-t1)^k = integral of t (1-t)^k over [0, t1],
    and that integral is (1 - (1-t1)^(k+1) (1 + (k+1) t1)) / ((k+1)(k+2)).

    Raises:
        UserError: k is below 1.
    """
    _check_k(k)

    def is_past(t: FloatArray) -> BoolArray:
        area = (1.0 - (1.0 - t) ** (k + 1) * (1.0 + (k + 1) * t)) / ((k + 1) * (k + 2))
        return np.asarray(t**2 * (1.0 - t) ** k < area)

    # The integrand rises up to 1/(k+1), where the edge therefore still exceeds the mean.
    return _first(is_past, signal_optimal_rate(k))


def sample_complexity_upper(k: int) -> float:
    """The t1 for which the window [0, t1] minimises `identifiability_bound`, over all windows.

    It maximises E[t] E[(1-t)^k]^2 and is the root in (0, 1) of (2k+1)(1-t1)^(k+1) - (2k+2)(1-t1)^k + 1. For k = 1 it is
    2/3, and every window with the same mean 1/3 is as good.

    Raises:
        UserError: k is below 1.
    """
    _check_k(k)

    def is_past(t: FloatArray) -> BoolArray:
        return np.asarray((2 * k + 1) * (1.0 - t) ** (k + 1) - (2 * k + 2) * (1.0 - t) ** k + 1.0 > 0.0)

    # The polynomial is 0 at t = 0, falls up to 1/(2k+1), then rises to 1.
    return _first(is_past, 1.0 / (2 * k + 1))


def schedule_identifiability_bound(
    schedule: MaskSchedule, n: int, k: int, delta: float, progress: float = 0.0
) -> float:
    """N = 4 log(4n/delta) / (E[t] E[(1-t)^k]^2): that many samples suffice to single out S.

    Args:
        schedule: distribution of the mask rate.
        n: bits per sample.
        k: size of the secret set.
        delta: allowed probability of failure.
        progress: share of the run's tokens seen so far, for a curriculum.

    Returns:
        Samples, as a real number; infinite where no mask helps (t always 0, or always 1).

    Raises:
        UserError: not 1 <= k <= n, or delta lies outside (0, 1).
    """
    _check_k(k)
    if k > n:
        raise UserError(f"the secret set cannot have k = {k} of n = {n} positions: k must be at most n")
    if not 0.0 < delta < 1.0:
        raise UserError(f"delta is a probability between 0 and 1, got {delta:g}")
    information = moment(schedule, 1, 0, progress) * moment(schedule, 0, k, progress) ** 2
    return 4.0 * math.log(4.0 * n / delta) / information if information > 0.0 else math.inf


def identifiability_bound(n: int, k: int, t0: float, t1: float, delta: float) -> float:
    """The bound of `schedule_identifiability_bound` for t uniform on [t0, t1].

    There E[t] = (t0+t1)/2 and E[(1-t)^k] = ((1-t0)^(k+1) - (1-t1)^(k+1)) / ((k+1)(t1-t0)).

    Raises:
        UserError: not 1 <= k <= n, delta lies outside (0, 1), or not 0 <= t0 < t1 <= 1.
    """
    return schedule_identifiability_bound(_window(t0, t1), n, k, delta)


def in_signal_regime(is_masked_BL: BoolArray, in_parity_L: BoolArray) -> BoolArray:
    """Whether exactly one position of S' is masked, per row.

    Args:
        is_masked_BL: masked positions.
        in_parity_L: the positions of S', the label's among them.
    """
    return np.asarray(np.count_nonzero(is_masked_BL & in_parity_L, axis=1) == 1)


def partition_by_regime(
    loss_B: FloatArray, is_masked_BL: BoolArray, in_parity_L: BoolArray, probability_B: FloatArray | None = None
) -> tuple[float, float]:
    """A loss as the sum of its rows in the signal and in the noise regime: exact for any loss and any model.

    Args:
        loss_B: loss of each row.
        is_masked_BL: masked positions.
        in_parity_L: the positions of S'.
        probability_B: weight of each row; equal ones that sum to 1 by default.

    Returns:
        (signal, noise), P_S E_S[loss] and P_N E_N[loss] over these masks.
    """
    share_B = loss_B * _probabilities(probability_B, len(loss_B))
    is_signal_B = in_signal_regime(is_masked_BL, in_parity_L)
    return float(np.sum(share_B[is_signal_B])), float(np.sum(share_B[~is_signal_B]))


@dataclass(frozen=True)
class EffectiveLoss:
    """The masked-diffusion loss on k-parity, as a sum of three.

    Attributes:
        signal: what a model pays for missing f* in the signal regime.
        noise: what it pays for any opinion in the noise regime: the implicit regulariser.
        constant: what no shared output can avoid.
    """

    signal: float
    noise: float
    constant: float

    @property
    def total(self) -> float:
        """The loss itself, for a shared output and x uniform over all 2^n."""
        return self.signal + self.noise + self.constant


def effective_loss(
    predictions: FloatArray,
    tokens_BL: npt.NDArray[np.integer],
    is_masked_BL: BoolArray,
    in_parity_L: BoolArray,
    mask_rate_B: FloatArray,
    *,
    loss: Loss = "squared",
    probability_B: FloatArray | None = None,
) -> EffectiveLoss:
    """The decomposition of E[(1/t) sum over masked i of loss(f, x'_i)] into a signal part and a noise part.

    With M the masked positions and loss = (f - x')^2 / 2:

        P_S E_S[ |M|/(2t) (f - f*)^2 ] + P_N E_N[ |M|/(2t) f^2 ] + constant,     f* = x'_{M∩S'} / |M|

    For the cross-entropy f is the probability of x' = 1; the squares become KL(q || f), with q = (1 + f*) / 2 in the
    signal regime and 1/2 in the noise regime. The three parts sum to the loss exactly where the rows, with their
    probabilities, run over all x in {-1, 1}^n, and **one output is shared by all masked positions**. A sample of x
    meets it in expectation only; a model whose output depends on the position does not meet it at all, since a position
    outside S' has target 0 and the one in S' has target x', rather than f* for all of them.

    Args:
        predictions: f, [B] for a shared output, or [B, L]: one for each position (only masked ones are read).
        tokens_BL: x', entries -1 and 1.
        is_masked_BL: masked positions.
        in_parity_L: the positions of S'.
        mask_rate_B: t of each row, positive where anything is masked.
        loss: `squared`, or `cross_entropy` in nats.
        probability_B: weight of each row; equal ones that sum to 1 by default.

    Raises:
        UserError: a token is neither -1 nor 1, a probability f lies outside [0, 1], or t is 0 in a row with masks.
    """
    if not np.all(np.abs(tokens_BL) == 1):
        raise UserError("the tokens of k-parity are -1 and 1")
    masked_B = np.count_nonzero(is_masked_BL, axis=1)
    if np.any((masked_B > 0) & (mask_rate_B <= 0.0)):
        raise UserError("a row with masked positions has mask rate 0")
    f_BL = np.broadcast_to(predictions.reshape(len(tokens_BL), -1), tokens_BL.shape)
    if loss == "cross_entropy" and np.any(is_masked_BL & ((f_BL < 0.0) | (f_BL > 1.0))):
        raise UserError("under cross_entropy a prediction is the probability of x' = 1, between 0 and 1")
    is_signal_B = in_signal_regime(is_masked_BL, in_parity_L)
    parity_sum_B = np.sum(np.where(is_masked_BL & in_parity_L, tokens_BL, 0), axis=1)
    target_B = np.where(is_signal_B, parity_sum_B / np.maximum(masked_B, 1), 0.0)
    if loss == "squared":
        excess_BL = 0.5 * (f_BL - target_B[:, None]) ** 2
        least_B = 0.5 * (1.0 - target_B**2)
    else:
        q_B = 0.5 * (1.0 + target_B)
        least_B = _cross_entropy(q_B, q_B)
        excess_BL = _cross_entropy(q_B[:, None], np.where(is_masked_BL, f_BL, 0.5)) - least_B[:, None]
    weight_B = _probabilities(probability_B, len(tokens_BL)) / np.where(masked_B > 0, mask_rate_B, 1.0)
    excess_B = weight_B * np.sum(excess_BL, axis=1, where=is_masked_BL)
    return EffectiveLoss(
        signal=float(np.sum(excess_B[is_signal_B])),
        noise=float(np.sum(excess_B[~is_signal_B])),
        constant=float(np.sum(weight_B * masked_B * least_B)),
    )


def ngram_signal(t: FloatArray, weights: Mapping[int, float], power: int = 1) -> FloatArray:
    """Signal(t) = sum over orders i of w_i (t (1-t)^(i-1))^power.

    An n-gram of order i is taken for a parity task of k = i - 1: its signal is one masked token of i (appendix F.4).

    Args:
        t: mask rates.
        weights: weight of each order.
        power: 1, linear in the signal probability, or 2, each term squared (the energy's power).

    Raises:
        UserError: no weights, an order below 1, negative weights or none positive, or another power.
    """
    if power not in (1, 2):
        raise UserError(f"power must be 1 (linear) or 2 (squared), got {power}")
    values = list(weights.values())
    if not all(math.isfinite(value) and value >= 0.0 for value in values) or not any(values):
        raise UserError(f"the n-gram weights must be non-negative, one of them positive; got {dict(weights)}")
    if min(weights) < 1:
        raise UserError(f"the order of an n-gram is at least 1, got {min(weights)}")
    t = np.asarray(t, dtype=np.float64)
    terms = [weight * (t * (1.0 - t) ** (order - 1)) ** power for order, weight in weights.items()]
    return np.asarray(sum(terms), dtype=np.float64)


def optimal_mask_rate(weights: Mapping[int, float], power: int = 1) -> float:
    """The t that maximises `ngram_signal`, to about 1e-8: the mask rate that a corpus' n-grams predict.

    The largest value on a grid, which is then refined between that point's neighbours: a sum of several bells may
    have several maxima.

    Raises:
        UserError: see `ngram_signal`.
    """
    low, high = 0.0, 1.0
    for _ in range(3):
        grid = np.linspace(low, high, 2001)
        best = int(np.argmax(ngram_signal(grid, weights, power)))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 2000)]
    return float(grid[best])


def _first(holds: Callable[[FloatArray], BoolArray], low: float) -> float:
    """Where a predicate on [low, 1] that turns true once does so."""
    return float(first_true(holds, np.array(low), np.array(1.0)))


def _window(t0: float, t1: float) -> Uniform:
    if not 0.0 <= t0 < t1 <= 1.0:
        raise UserError(f"a window needs 0 <= t0 < t1 <= 1, got t0 = {t0:g} and t1 = {t1:g}")
    return Uniform(t0, t1)


def _check_k(k: int) -> None:
    if k < 1:
        raise UserError(f"the secret set needs at least one position, got k = {k}")


def _probabilities(probability_B: FloatArray | None, rows: int) -> FloatArray:
    return np.full(rows, 1.0 / rows) if probability_B is None else probability_B


def _cross_entropy(q: FloatArray, p: FloatArray) -> FloatArray:
    """-q log p - (1-q) log(1-p), with 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(q > 0.0, q * np.log(p), 0.0) - np.where(q < 1.0, (1.0 - q) * np.log1p(-p), 0.0)

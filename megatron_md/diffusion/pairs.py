"""Rows in pairs: masks that have something in common within a global batch, so that its gradient varies less.

Rows g = 2k and 2k + 1 are pair k, whatever rank computes them (a global batch holds an even number of rows):

    antithetic      two texts, at the rates F^-1(u) and F^-1(1 - u)
    complementary   one text twice: masked at rate s, and exactly where that was not, at rate 1 - s (LLaDA2.0's
                    complementary masks, arXiv 2512.15745); every maskable token is predicted once a pair

u is stratified over the pairs of a global batch. Under `antithetic` each row's rate has the schedule's law. Under
`complementary` a row's rate has the law of s or of 1 - s, each for half of the rows (`Mirrored`), with s kept within
[floor, 1 - floor] so that both have the exact weight 1/rate. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from megatron_md.batch import BoolArray, CleanBatch
from megatron_md.config import ObjectiveConfig
from megatron_md.diffusion._schedule_base import FloatArray, MaskSchedule, first_true, parse_schedule
from megatron_md.diffusion.corruption import (
    ONE_BELOW,
    is_below_rate,
    mask_at_rate,
    stratified_uniforms,
    stratified_uniforms_of_rows,
    uniforms_of_rows,
)
from megatron_md.errors import UserError

Pairs = Literal["none", "antithetic", "complementary"]


class Mirrored(MaskSchedule):
    """The law of s and 1 - s with equal chance, s from a schedule: density (p(t) + p(1 - t)) / 2, mean 1/2.

    Attributes:
        schedule: of s.
        floor: s is kept within [floor, 1 - floor] where expectations are taken.
    """

    def __init__(self, schedule: MaskSchedule, floor: float = 0.0) -> None:
        self.schedule, self.floor = schedule, floor

    def density(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Equal to (p(t) + p(1 - t)) / 2."""
        return 0.5 * (self.schedule.density(t, progress) + self.schedule.density(1.0 - t, progress))

    def cdf(self, t: FloatArray, progress: float = 0.0) -> FloatArray:
        """Equal to (F(t) + 1 - F(1 - t)) / 2 where there is no atom."""
        t = np.asarray(t, dtype=np.float64)
        return np.asarray(0.5 * (self.schedule.cdf(t, progress) + 1.0 - self.schedule.cdf(1.0 - t, progress)))

    def inverse_cdf(self, u: FloatArray, progress: float = 0.0) -> FloatArray:
        """By bisection."""
        u = np.asarray(u, dtype=np.float64)
        return first_true(lambda t: self.cdf(t, progress) >= u, np.zeros_like(u), np.ones_like(u))

    def expectation(self, function: Callable[[FloatArray], FloatArray], progress: float = 0.0) -> float:
        """(E f(s) + E f(1 - s)) / 2."""
        low, high = self.floor, 1.0 - self.floor

        def both(t: FloatArray) -> FloatArray:
            s = np.clip(t, low, high)
            return 0.5 * (np.asarray(function(s)) + np.asarray(function(1.0 - s)))

        return self.schedule.expectation(both, progress)

    def mean(self, progress: float = 0.0) -> float:
        """Equal to 1/2."""
        return 0.5

    def __str__(self) -> str:
        return f"{self.schedule} and its mirror image"


def law_of_rates(config: ObjectiveConfig) -> MaskSchedule:
    """The law of the mask rate of a row: the config's schedule, or what becomes of it in pairs.

    Raises:
        UserError: see `parse_schedule`.
    """
    schedule = parse_schedule(config.mask_schedule)
    return Mirrored(schedule, config.min_mask_rate) if config.pairs == "complementary" else schedule


def draw_rates(seed: int, batch: CleanBatch, schedule: MaskSchedule, pairs: Pairs, floor: float) -> FloatArray:
    """The mask rate t of each row, before the floor (under `complementary` within it): float64 [B].

    Args:
        seed: the run's seed.
        batch: rows of a global batch.
        schedule: the config's schedule.
        pairs: how rows belong together.
        floor: the least rate.

    Raises:
        UserError: pairs do not fit into the global batch.
    """
    progress = batch.position.progress
    if pairs == "none":
        return schedule.sample(stratified_uniforms_of_rows(seed, batch), progress)
    first, size = batch.position.first_sample_index, batch.position.global_batch_size
    if first % 2 or size % 2:  # a foreign loop's: the config's own are checked
        raise UserError(
            f"objective.pairs {pairs} needs an even number of rows in a global batch: got {size}, row {first} on"
        )
    pair_B, is_second_B = np.divmod(batch.sample_index_B - first, 2)
    u_B = stratified_uniforms(seed, first // 2, size // 2, "mask_rate/pairs")[pair_B]
    if pairs == "antithetic":
        return schedule.sample(np.where(is_second_B, np.minimum(1.0 - u_B, ONE_BELOW), u_B), progress)
    s_B = np.clip(schedule.sample(u_B, progress), floor, 1.0 - floor)
    return np.asarray(np.where(is_second_B, 1.0 - s_B, s_B), dtype=np.float64)


def draw_masks(seed: int, batch: CleanBatch, mask_rate_B: FloatArray, pairs: Pairs) -> BoolArray:
    """is_masked_BL at these rates; see `corruption.mask_at_rate`."""
    index_B = batch.sample_index_B
    if pairs != "complementary":
        return mask_at_rate(seed, index_B, mask_rate_B, batch.is_maskable_BL)
    is_second_B = index_B % 2 == 1
    u_BL = uniforms_of_rows(seed, "is_masked", index_B - is_second_B, batch.is_maskable_BL.shape[1])
    s_B = np.where(is_second_B, 1.0 - mask_rate_B, mask_rate_B)
    is_below_BL = is_below_rate(u_BL, s_B, np.ones_like(batch.is_maskable_BL))
    return np.asarray((is_below_BL ^ is_second_B[:, None]) & batch.is_maskable_BL, dtype=np.bool_)

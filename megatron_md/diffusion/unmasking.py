"""Sampling strategies: which of a step's proposals are committed and which positions stay masked.

A strategy is a small function from a `Choice` to the positions it commits, in a registry that third parties can add to.
The last step of a block commits whatever is still open, whatever the strategy says.
Shape letters: B rows, K positions of the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_md.diffusion.names import strategies


@dataclass(frozen=True)
class Choice:
    """What a strategy decides on. The three confidences are fp32, of the denoiser's own distribution (temperature 1).

    Attributes:
        is_open_BK: positions of the block that still hold the mask token.
        probability_BK: the denoiser's probability of each proposed token.
        margin_BK: its largest probability less its second largest.
        negative_entropy_BK: sum of p log p over its tokens, in nats.
        quota_B: positions that a strategy with a fixed number per step is to commit in each row.
        step: number of this step within the block, from 0.
        steps: steps of the block.
        threshold: probability from which `threshold` commits.
        factor: f of `factor`.
        generators: sources of randomness on the denoiser's device: one for all rows, or one for each.
    """

    is_open_BK: torch.Tensor
    probability_BK: torch.Tensor
    margin_BK: torch.Tensor
    negative_entropy_BK: torch.Tensor
    quota_B: torch.Tensor
    step: int
    steps: int
    threshold: float
    factor: float
    generators: Sequence[torch.Generator]

    def uniforms_BK(self) -> torch.Tensor:
        """A fresh uniform for every position of the block, float64.

        A full row with a generator of its own draws none, as if it were alone.
        """
        (rows, width), device = self.is_open_BK.shape, self.is_open_BK.device
        if len(self.generators) == 1:
            return torch.rand((rows, width), dtype=torch.float64, device=device, generator=self.generators[0])
        uniforms_BK = torch.zeros((rows, width), dtype=torch.float64, device=device)
        for row, is_open in enumerate(self.is_open_BK.any(dim=1).tolist()):
            if is_open:
                uniforms_BK[row] = torch.rand(width, dtype=torch.float64, device=device, generator=self.generators[row])
        return uniforms_BK


register_strategy = strategies.register


def transfer_counts(open_B: torch.Tensor, steps: int) -> torch.Tensor:
    """Positions to commit in each step, as even as possible, the larger numbers first: [B, steps].

    Row with n open positions: n // steps in every step and one more in the first n % steps (LLaDA's sampler).
    """
    extra_BS = torch.arange(steps, device=open_B.device)[None] < (open_B % steps)[:, None]
    return (open_B // steps)[:, None] + extra_BS.to(open_B.dtype)


def ancestral_commit_probability(step: int, steps: int) -> float:
    """Chance 1 - s/t that an open position is committed between t = 1 - step/steps and s = t - 1/steps.

    The reverse step of MDLM (Sahoo et al. 2024): stay masked with s/t, else a token from the denoiser's distribution.
    """
    return 1.0 / (steps - step)


@register_strategy("low_confidence")
def low_confidence(choice: Choice) -> torch.Tensor:
    """Commit the proposals with the highest probability; those of low confidence stay masked (LLaDA)."""
    return largest(choice.probability_BK, choice.is_open_BK, choice.quota_B)


@register_strategy("random")
def random_order(choice: Choice) -> torch.Tensor:
    """Commit as many, at random positions (LLaDA's random remasking)."""
    return largest(choice.uniforms_BK(), choice.is_open_BK, choice.quota_B)


@register_strategy("margin")
def top_k_margin(choice: Choice) -> torch.Tensor:
    """Commit where the likeliest token leads the second by most (Dream's `topk_margin`; Kim et al. 2025)."""
    return largest(choice.margin_BK, choice.is_open_BK, choice.quota_B)


@register_strategy("entropy")
def low_entropy(choice: Choice) -> torch.Tensor:
    """Commit where the denoiser's distribution has the least entropy (Dream)."""
    return largest(choice.negative_entropy_BK, choice.is_open_BK, choice.quota_B)


@register_strategy("ancestral")
def ancestral(choice: Choice) -> torch.Tensor:
    """Commit every open position independently with the reverse process's probability; all in the last step."""
    return choice.uniforms_BK() < ancestral_commit_probability(choice.step, choice.steps)


@register_strategy("first_hitting")
def first_hitting(choice: Choice) -> torch.Tensor:
    """Commit one open position, uniformly chosen: the continuous-time reverse process without its waiting times.

    The first of n open positions is hit at t' = t u^(1/n), all equally likely (Zheng et al. 2024, first-hitting
    sampler). A denoiser that is not told t needs no t', so the order is all that remains, and the sample is exact.
    """
    return largest(choice.uniforms_BK(), choice.is_open_BK, torch.ones_like(choice.quota_B))


@register_strategy("threshold")
def over_threshold(choice: Choice) -> torch.Tensor:
    """Commit every proposal of probability >= threshold, at least the likeliest one (Fast-dLLM, Wu et al. 2025)."""
    best_BK = largest(choice.probability_BK, choice.is_open_BK, torch.ones_like(choice.quota_B))
    return choice.is_open_BK & ((choice.probability_BK >= choice.threshold) | best_BK)


@register_strategy("factor")
def within_factor(choice: Choice) -> torch.Tensor:
    """Commit the n likeliest proposals for the largest n with (n + 1)(1 - p_n) <= factor, at least one (Fast-dLLM).

    p_1 >= p_2 >= ... are the probabilities of the proposals; n is counted up to the first that fails.
    """
    score_BK = choice.probability_BK.masked_fill(~choice.is_open_BK, -torch.inf)
    sorted_BK = score_BK.sort(dim=1, descending=True).values
    rank_K = torch.arange(1, score_BK.shape[1] + 1, device=score_BK.device)
    passes_BK = sorted_BK >= 1.0 - choice.factor / (rank_K + 1)
    passes_BK[:, 0] = True
    return largest(choice.probability_BK, choice.is_open_BK, passes_BK.long().cumprod(dim=1).sum(dim=1))


def largest(score_BK: torch.Tensor, is_open_BK: torch.Tensor, count_B: torch.Tensor) -> torch.Tensor:
    """The `count_B` open positions of each row with the largest scores; the leftmost among equals."""
    score_BK = score_BK.masked_fill(~is_open_BK, -torch.inf)
    order_BK = torch.sort(score_BK, dim=1, descending=True, stable=True).indices
    is_chosen_BK = torch.arange(score_BK.shape[1], device=score_BK.device)[None] < count_B[:, None]
    return torch.zeros_like(is_open_BK).scatter(1, order_BK, is_chosen_BK) & is_open_BK

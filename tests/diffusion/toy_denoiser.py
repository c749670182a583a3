"""A law over short sequences with its exact denoiser, the laws that samplers have on it, and a test of fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch

from megatron_md.diffusion.unmasking import ancestral_commit_probability

FloatArray = npt.NDArray[np.float64]

# One test's false-alarm rate; the ten or so of a file together stay below 1e-6.
ALARM_Z = NormalDist().inv_cdf(1.0 - 2.5e-8)


class ToyLaw:
    """All V^N sequences with probabilities `law_X`, and p(x_i | visible tokens) for all (V+1)^N partly masked ones.

    Attributes:
        mask: the mask token, V.
        tokens_XN: sequences; number x is written in base V.
        states_SN: partly masked sequences; number s is written in base V+1.
        conditional_SNV: exact p(x_i = v | visible); rows of visible positions mean nothing.
    """

    def __init__(self, law_X: FloatArray, vocab: int, length: int) -> None:
        self.vocab, self.length, self.mask, self.law_X = vocab, length, vocab, law_X
        self.tokens_XN = np.array(list(product(range(vocab), repeat=length)))
        self.states_SN = np.array(list(product(range(vocab + 1), repeat=length)))
        agrees_SX = np.all(
            (self.states_SN[:, None] == self.tokens_XN[None]) | (self.states_SN[:, None] == self.mask), axis=2
        )
        is_token_XNV = self.tokens_XN[..., None] == np.arange(vocab)
        joint_SNV = np.einsum("sx,x,xnv->snv", agrees_SX, law_X, is_token_XNV)
        self.conditional_SNV = joint_SNV / joint_SNV.sum(axis=2, keepdims=True).clip(1e-300)

    @classmethod
    def random(cls, vocab: int, length: int, seed: int = 0) -> ToyLaw:
        weights = np.exp(1.5 * np.random.default_rng(seed).standard_normal(vocab**length))
        return cls(weights / weights.sum(), vocab, length)

    @classmethod
    def tied_bits(cls) -> ToyLaw:
        return cls(np.array([0.5, 0.0, 0.0, 0.5]), 2, 2)

    def number(self, tokens_BN: torch.Tensor, base: int) -> torch.Tensor:
        powers = base ** torch.arange(self.length - 1, -1, -1, device=tokens_BN.device)
        return (tokens_BN * powers).sum(dim=1)

    def __call__(self, tokens_BN: torch.Tensor) -> torch.Tensor:
        """The exact denoiser: logits with a tempting column for the mask token."""
        logits_SNV = torch.from_numpy(np.log(np.maximum(self.conditional_SNV, 1e-300)))
        logits_SNV = torch.cat([logits_SNV, torch.full_like(logits_SNV[..., :1], 9.0)], dim=2)
        return logits_SNV[self.number(tokens_BN, self.vocab + 1)]

    def counts(self, tokens_BN: torch.Tensor) -> FloatArray:
        """How often each sequence is there."""
        numbers = self.number(tokens_BN, self.vocab).numpy()
        return np.bincount(numbers, minlength=len(self.law_X)).astype(np.float64)

    def ancestral_law(
        self, steps: int, commit: Callable[[int, int], float] = ancestral_commit_probability
    ) -> FloatArray:
        """The law that the T-step ancestral sampler has, by going through all states; the last step commits all."""
        state_S = np.zeros(len(self.states_SN))
        state_S[-1] = 1.0  # all positions masked
        for step in range(steps):
            chance = 1.0 if step == steps - 1 else commit(step, steps)
            state_S = state_S @ self._transition(chance)
        is_full_S = ~np.any(self.states_SN == self.mask, axis=1)
        return state_S[is_full_S]

    def _transition(self, chance: float) -> FloatArray:
        """[S, S]: every open position is committed with `chance`, independently, from its conditional."""
        is_open_SN = self.states_SN == self.mask
        matrix_SS = np.ones((len(self.states_SN),) * 2)
        for i in range(self.length):
            to_SW = np.concatenate(
                [chance * self.conditional_SNV[:, i], np.full((len(is_open_SN), 1), 1.0 - chance)], axis=1
            )
            stays_SS = self.states_SN[:, i][:, None] == self.states_SN[:, i][None]
            matrix_SS *= np.where(is_open_SN[:, i][:, None], to_SW[:, self.states_SN[:, i]], stays_SS)
        return matrix_SS


def misfit_z(counts_X: FloatArray, law_X: FloatArray) -> float:
    """Pearson's chi-square of counts against a law, as a standard normal (Wilson and Hilferty 1931).

    Infinite where something impossible was seen.
    """
    is_possible_X = law_X > 1e-12
    if counts_X[~is_possible_X].any():
        return math.inf
    expected = counts_X.sum() * law_X[is_possible_X]
    assert expected.min() > 5.0, "too few samples for chi-square"
    freedom = len(expected) - 1
    chi_square = float(np.sum((counts_X[is_possible_X] - expected) ** 2 / expected))
    spread = 2.0 / (9.0 * freedom)
    return ((chi_square / freedom) ** (1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread)

"""Laws with exact conditionals, rows drawn from them, and what every estimator must find on those rows."""

from __future__ import annotations

import math

import numpy as np

from megatron_md.diffusion.corruption import FloatArray
from megatron_md.diffusion.scoring import ScoredRows
from tests.diffusion.denoiser_scorer import DenoiserScorer
from tests.diffusion.toy_denoiser import ToyLaw

VOCAB, LENGTH = 3, 5


def law_of(name: str) -> ToyLaw:
    """`uniform`, `unigram` (independent tokens) or `markov` (a chain) over 3^5 sequences."""
    first = np.array([1.0, 1.0, 1.0]) / 3 if name == "uniform" else np.array([0.6, 0.3, 0.1])
    step = np.tile(first, (VOCAB, 1))
    if name == "markov":
        step = np.array([[0.85, 0.1, 0.05], [0.1, 0.2, 0.7], [0.3, 0.65, 0.05]])
    law = ToyLaw(np.ones(VOCAB**LENGTH), VOCAB, LENGTH)
    tokens = law.tokens_XN
    return ToyLaw(first[tokens[:, 0]] * step[tokens[:, :-1], tokens[:, 1:]].prod(axis=1), VOCAB, LENGTH)


class ToyRows:
    """Rows of a law, the exact denoiser as a scorer, and exact figures.

    Attributes:
        nll: mean -log p(x) of the rows, in nats per token.
        ce_L: mean cross-entropy at exactly l = 1..N masked positions.
    """

    def __init__(self, name: str, rows: int, *, seed: int = 0) -> None:
        self.law = law_of(name)
        number_R = np.random.default_rng(seed).choice(len(self.law.law_X), rows, p=self.law.law_X)
        tokens_RL = self.law.tokens_XN[number_R]
        self.rows = ScoredRows(tokens_RL, np.ones_like(tokens_RL, dtype=bool))
        self.scorer = DenoiserScorer(self.law, micro_batch_size=500, excluded=(self.law.mask,))
        self.nll = float(-np.log(self.law.law_X[number_R]).mean()) / LENGTH
        self.ce_L = self._ce_by_count()[:, number_R].mean(axis=1)

    def _ce_by_count(self) -> FloatArray:
        """[N, X]: each sequence's mean cross-entropy at l masked positions, over all sets of them."""
        law = self.law
        powers = (VOCAB + 1) ** np.arange(LENGTH - 1, -1, -1)
        mean_LX = np.zeros((LENGTH, len(law.tokens_XN)))
        for subset in range(1, 2**LENGTH):
            masked = [i for i in range(LENGTH) if subset >> i & 1]
            state_XN = law.tokens_XN.copy()
            state_XN[:, masked] = law.mask
            conditional_XMV = law.conditional_SNV[state_XN @ powers][:, masked]
            p_XM = np.take_along_axis(conditional_XMV, law.tokens_XN[:, masked][..., None], axis=2)[..., 0]
            count = len(masked)
            mean_LX[count - 1] += -np.log(p_XM).mean(axis=1) / math.comb(LENGTH, count)
        return mean_LX

    def rate_target(self, smallest: float) -> float:
        """Mean of CE(t) over t in [smallest, 1], by Gauss-Legendre (exact for polynomials)."""
        node, weight = np.polynomial.legendre.leggauss(8)
        t = smallest + (1 - smallest) * (node + 1) / 2
        ce = sum(
            math.comb(LENGTH, count)
            * t**count
            * (1 - t) ** (LENGTH - count)
            * count
            / (LENGTH * t)
            * self.ce_L[count - 1]
            for count in range(1, LENGTH + 1)
        )
        return float(np.sum(weight * ce) / 2)

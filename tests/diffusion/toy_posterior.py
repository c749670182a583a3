"""A small joint law over sequences whose conditionals are known exactly: the ideal denoiser."""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


class ToyPosterior:
    """A law over all V^n sequences, and -log p(x_i | visible tokens) for every sequence and set of masked positions.

    Attributes:
        tokens_XN: all sequences.
        law_X: their probabilities.
        is_masked_SN: all 2^n sets of masked positions; set s has position i masked iff bit i of s is set.
        nll_XSN: -log p(x_i | x outside the set); meaningless where i is not in the set.
    """

    def __init__(self, vocab: int, length: int, *, noise: float | None = None, seed: int = 0) -> None:
        """A random law, or, given `noise`, copies of one hidden token that are wrong with that probability."""
        self.tokens_XN = np.array(list(product(range(vocab), repeat=length)), dtype=np.int64)
        logits_X = 2.0 * np.random.default_rng(seed).standard_normal(len(self.tokens_XN))
        self.law_X = np.exp(logits_X) / np.exp(logits_X).sum()
        if noise is not None:
            is_copy_XVN = self.tokens_XN[:, None, :] == np.arange(vocab)[None, :, None]
            self.law_X = np.where(is_copy_XVN, 1.0 - noise, noise / (vocab - 1)).prod(axis=2).mean(axis=1)
        self.is_masked_SN = (np.arange(2**length)[:, None] >> np.arange(length)) % 2 == 1
        equal_XXN = self.tokens_XN[:, None] == self.tokens_XN[None]
        self.nll_XSN = np.zeros((len(self.law_X), len(self.is_masked_SN), length))
        for s, is_masked_N in enumerate(self.is_masked_SN):
            agrees_XX = np.all(equal_XXN | is_masked_N, axis=2)
            visible_X = agrees_XX @ self.law_X
            for i in range(length):
                self.nll_XSN[:, s, i] = -np.log((agrees_XX & equal_XXN[:, :, i]) @ self.law_X / visible_X)

    @property
    def nll_X(self) -> FloatArray:
        """-log p(x) in nats of each whole sequence."""
        return -np.log(self.law_X)

    @property
    def sum_XS(self) -> FloatArray:
        """Sum of the masked tokens' negative log-likelihoods for each sequence and set."""
        return np.sum(self.nll_XSN * self.is_masked_SN, axis=2)

"""Uniform attention: an MLP on the sum of one-hot embeddings, with one output for all masked positions.

The model of appendix F.1 of arXiv 2601.22450, and of its theorem, whose decomposition of the loss assumes an output
that all masked positions share. It is no transformer, so it runs outside Megatron: its stepper stands in for
`megatron_md.train.step.Stepper`, and task, corruption, objective, loop, callbacks and records are those of every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_md.batch import CleanBatch, CorruptedBatch
from megatron_md.diffusion.objective import Objective
from megatron_md.parity.config import VOCABULARY, ParityConfig
from megatron_md.train.bad_numbers import not_finite
from megatron_md.train.step import Judge, StepReport


class UniformAttentionModel(nn.Module):
    """f(x) = MLP(sum_i e_{i, x_i}): a logit for the bit 1 at every masked position, the same at each."""

    def __init__(self, length: int, hidden: int, layers: int, seed: int) -> None:
        """Draw PyTorch's default initial weights from `seed`."""
        super().__init__()
        widths = [length * VOCABULARY, *[hidden] * layers]
        blocks: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for fan_in, fan_out in pairwise(widths):
                blocks += [nn.Linear(fan_in, fan_out), nn.ReLU()]
            self.mlp = nn.Sequential(*blocks, nn.Linear(widths[-1], 1))

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Logits [B] of the bit 1."""
        one_hot = nn.functional.one_hot(tokens_BL, VOCABULARY).flatten(1).to(torch.float32)
        return torch.squeeze(self.mlp(one_hot), 1)


class UniformAttentionStepper:
    """What the loop and the callbacks ask of a `Stepper`, for this model in one process."""

    causal = right_shift = within_document = False
    block_size: int | None = None
    data_rank, data_size = 0, 1

    def __init__(self, config: ParityConfig, objective: Objective) -> None:
        """Build model and optimizer."""
        keys = config.optimizer
        self.objective = objective
        self.micro_batch_size = config.train.micro_batch_size
        self.clip_grad = keys.clip_grad
        shape = config.uniform_attention
        self.model = UniformAttentionModel(config.task.n + 1, shape.hidden, shape.layers, config.seed)
        self.chunks = [self.model]
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        biases: dict[str, Any] = {"params": [p for p in self.model.parameters() if p.dim() <= 1], "wd_mult": 0.0}
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, biases], betas=(keys.beta1, keys.beta2), eps=keys.eps, fused=True
        )

    def corrupt(self, batches: Sequence[CleanBatch]) -> list[CorruptedBatch]:
        """Corrupt the micro-batches of a global batch."""
        return [self.objective.corrupt(batch) for batch in batches]

    def _nll(self, batch: CorruptedBatch) -> torch.Tensor:
        """Negative log-likelihood [M] of each target in nats."""
        logit_B = self.model(torch.from_numpy(batch.tokens_BL))
        row_M = torch.from_numpy(batch.positions_M // batch.tokens_BL.shape[1])
        sign_M = 1.0 - 2.0 * torch.from_numpy(batch.targets_M).to(torch.float32)
        return nn.functional.softplus(sign_M * logit_B[row_M])

    def train(
        self, batches: Sequence[CorruptedBatch], judge: Judge = not_finite, votes: Sequence[float] = ()
    ) -> StepReport:
        """One optimizer step; see `Stepper.train`."""
        self.optimizer.zero_grad()
        count = max(1, sum(batch.denominator for batch in batches))
        loss = 0.0
        sums: dict[str, tuple[float, float]] = {}
        for batch in batches:
            nll_M = self._nll(batch)
            part = torch.dot(nll_M, torch.from_numpy(batch.weights_M)) / count
            part.backward()
            loss += part.item()
            for name, (value, number) in self.objective.reduce(nll_M.detach(), batch).items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + float(value), before[1] + number)
        largest = self.clip_grad if self.clip_grad > 0.0 else math.inf
        grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), largest))
        fault = judge(loss, grad_norm)
        if fault is None:
            self.optimizer.step()
        metrics = {name: value / number if number else math.nan for name, (value, number) in sums.items()}
        return StepReport(loss, grad_norm, fault, metrics, list(votes))

    @torch.no_grad()
    def negative_log_likelihoods(self, batches: Sequence[CorruptedBatch]) -> list[np.ndarray[Any, Any]]:
        """Each batch's nll_M in nats."""
        return [self._nll(batch).numpy() for batch in batches]

    def sum_over_ranks(self, figures: torch.Tensor) -> torch.Tensor:
        """There is one rank."""
        return figures

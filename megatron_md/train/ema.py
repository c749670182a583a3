"""Exponential moving average of the weights, one more fp32 tensor beside Adam's two for each weight that is trained.

After update n (from 1) of weights theta:  ema_n = d_n ema_(n-1) + (1 - d_n) theta_n,  d_n = min(decay, (1+n)/(10+n)).
The average begins with the weights that training starts from; the warm-up of d_n (as in TensorFlow's
`ExponentialMovingAverage`) forgets them where a constant decay of 0.9999 would take tens of thousands of updates.

It lies in the optimizer's state, so that it is split, saved, compared between ranks and loaded as that is: under the
distributed optimizer each rank averages its own shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_md.model.build import settled_parameters

NAME = "ema"


def decay_at(decay: float, updates: int) -> float:
    """The share of the old average that stays in it at an update: min(decay, (1+n)/(10+n)).

    Args:
        decay: in the long run.
        updates: n, this one included.
    """
    return min(decay, (1 + updates) / (10 + updates))


def _optimized(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """(weights as the optimizer keeps them, its state of them), of this rank's share of what is trained."""
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        for group in part.optimizer.param_groups:
            for weights in group["params"]:
                yield weights, part.optimizer.state[weights]


def _pairs(optimizer: MegatronOptimizer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The averages, and the weights that they are of; both empty where no average is kept."""
    found = [(state[NAME], weights) for weights, state in _optimized(optimizer) if NAME in state]
    return [average for average, _ in found], [weights.detach() for _, weights in found]


@torch.no_grad()
def keep(optimizer: MegatronOptimizer) -> None:
    """Keep an average from here on, which begins with the present weights; the optimizer's state must be there."""
    for weights, state in _optimized(optimizer):
        state[NAME] = weights.detach().clone()


@torch.no_grad()
def restart(optimizer: MegatronOptimizer) -> None:
    """Let the average begin with the present weights, if one is kept."""
    averages, weights = _pairs(optimizer)
    if averages:
        torch._foreach_copy_(averages, weights)


@torch.no_grad()
def update(optimizer: MegatronOptimizer, decay: float, updates: int) -> None:
    """Take the weights of an update into the average.

    Args:
        optimizer: after the update.
        decay: see `decay_at`.
        updates: how many have been made, this one included.
    """
    averages, weights = _pairs(optimizer)
    if averages:
        torch._foreach_lerp_(averages, weights, 1.0 - decay_at(decay, updates))


@contextmanager
def in_model(optimizer: MegatronOptimizer, chunks: list[Any]) -> Iterator[None]:
    """Within it, the model computes with the average; afterwards, whatever happens, with its weights, bit for bit.

    Both change places, a tensor at a time: it takes no more memory than the largest of them, and with the distributed
    optimizer the gather of the weights that follows an update, twice. Every rank calls this.
    """
    with settled_parameters(chunks):
        _exchange(optimizer, chunks)
        try:
            yield
        finally:
            _exchange(optimizer, chunks)


@torch.no_grad()
def _exchange(optimizer: MegatronOptimizer, chunks: list[Any]) -> None:
    for average, weights in zip(*_pairs(optimizer), strict=True):
        before = weights.clone()
        weights.copy_(average)
        average.copy_(before)
    for part in optimizer.chained_optimizers:
        # An optimizer of fp32 weights that is not distributed has no copy of them.
        if not getattr(part, "is_stub_optimizer", False) and hasattr(part, "_copy_main_params_to_model_params"):
            part._copy_main_params_to_model_params()
    if any(isinstance(part, DistributedOptimizer) for part in optimizer.chained_optimizers):
        for chunk in chunks:
            assert isinstance(chunk, DistributedDataParallel)
            chunk.start_param_sync(force_sync=True)

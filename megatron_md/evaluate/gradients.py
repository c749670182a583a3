"""Gradients of a trained run by mask rate: what `schedule fit` takes its statistics of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_md.batch import BatchPosition, CleanBatch, CorruptedBatch
from megatron_md.checkpoint.manager import CheckpointManager
from megatron_md.checkpoint.state import optimizer_slices
from megatron_md.config import ResolvedConfig
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.corruption import FloatArray
from megatron_md.diffusion.fit import BINS
from megatron_md.diffusion.objective import build_objective
from megatron_md.diffusion.scoring import ScoredRows
from megatron_md.model.build import build_model, wrap_data_parallel
from megatron_md.parallel import World
from megatron_md.run.saved import SavedRun
from megatron_md.train.optimizer import build_optimizer, optimizer_updates
from megatron_md.train.step import Stepper, corrupt

SKETCH = 1 << 15


class Sketch:
    """Count sketch of a list of tensors (Charikar et al. 2002): sums of signed elements in random buckets.

    Inner products are kept without bias, with a standard error of about |x| |y| / sqrt(size).
    """

    def __init__(self, tensors: list[torch.Tensor], *, size: int = SKETCH, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        # Bucket and sign of each element in one number.
        self._codes = [
            torch.randint(2 * size, (tensor.numel(),), generator=generator, dtype=torch.int32).to(tensor.device)
            for tensor in tensors
        ]

    def __call__(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The sketch of tensors of the same shapes: fp32 [size]."""
        total = torch.zeros(self.size, device=tensors[0].device)
        for code, tensor in zip(self._codes, tensors, strict=True):
            signed = torch.where(code % 2 == 0, tensor.reshape(-1), -tensor.reshape(-1))
            total.index_add_(0, code // 2, signed)
        return total


@dataclass(frozen=True)
class ByRate:
    """What rows' losses and gradients are at each bin of the mask rate.

    Attributes:
        gradients_AKD: sketched, preconditioned mean gradient of each group of rows: fp32.
        loss_AR: loss of each row in nats per token, weighted by 1/t.
        step: of the checkpoint.
    """

    gradients_AKD: npt.NDArray[np.float32]
    loss_AR: FloatArray
    step: int


def objective_of_bin(config: ResolvedConfig, number: int) -> ResolvedConfig:
    """The run, trained in one bin of the mask rate by the ELBO's weights alone."""
    keys = replace(
        config.objective,
        mask_schedule=f"uniform:{number / BINS!r},{(number + 1) / BINS!r}",
        weight="elbo",
        importance=False,
        normalise="maskable",
        pairs="none",
        attention_annealing=0.0,
    )
    return replace(config, objective=keys)


def gradients_by_rate(
    saved: SavedRun,
    world: World,
    tokenizer: Tokenizer,
    rows: ScoredRows,
    *,
    group: int,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> ByRate:
    """Load a checkpoint with its optimizer, and take the gradient of every group of rows at every bin of the mask rate.

    The masks of a row are nested over the bins. Each element of a gradient is divided by sqrt(sqrt(exp_avg_sq) + eps)
    of AdamW with its correction, which makes an Euclidean inner product that of the preconditioner.

    Args:
        saved: opened for one process.
        world: this process.
        tokenizer: the run's.
        rows: held-out rows.
        group: rows of a gradient, of which `rows` has a multiple.
        seed: of masks and sketch.
        advance: called after each gradient.

    Raises:
        CheckpointError: the checkpoint is damaged.
        UserError: it holds no optimizer state.
    """
    train = replace(saved.config.train, micro_batch_size=group, global_batch_size=group, dropout=0.0)
    config = replace(saved.config, train=train, seed=seed)
    stepper = _load(replace(saved, config=config), world, tokenizer.mask_token_id)
    parameters, scales = _preconditioner(config, stepper)
    sketch = Sketch(scales, seed=seed)
    groups = len(rows.tokens_RL) // group
    gradients_AKD = np.empty((BINS, groups, sketch.size), dtype=np.float32)
    loss_AR = np.empty((BINS, groups * group))
    for a in range(BINS):
        binned = objective_of_bin(config, a)
        objective = build_objective(binned.objective, seed=seed, mask_token_id=tokenizer.mask_token_id)
        for k in range(groups):
            index = np.arange(k * group, (k + 1) * group)
            (batch,) = corrupt(binned, objective, [_clean(rows, index)])
            (nll_M,) = (output.nll_M.cpu().numpy() for output in _backward(stepper, batch))
            found = [p.main_grad.float() * scale for p, scale in zip(parameters, scales, strict=True)]
            gradients_AKD[a, k] = sketch(found).cpu().numpy()
            loss_AR[a, index] = _row_losses(batch, nll_M, rows.maskable_R[index])
            advance()
    return ByRate(gradients_AKD, loss_AR, saved.step)


def _load(saved: SavedRun, world: World, mask_token_id: int) -> Stepper:
    """The run's model and optimizer, as in training."""
    config = saved.config
    objective = build_objective(config.objective, seed=config.seed, mask_token_id=mask_token_id)
    chunks: list[Any] = build_model(
        config, world.device, causal=objective.causal, mask_token_id=mask_token_id, initialize=False
    )
    chunks = wrap_data_parallel(chunks, config)
    optimizer = build_optimizer(config, chunks)
    manager = CheckpointManager(saved.checkpoint.parent.parent, keep_last=1, resolved_config="")
    manager.load(chunks, optimizer, saved.checkpoint)
    return Stepper(config, world, chunks, optimizer, objective)


def _preconditioner(config: ResolvedConfig, stepper: Stepper) -> tuple[list[Any], list[torch.Tensor]]:
    """Parameters, and 1 / sqrt(sqrt(exp_avg_sq / (1 - beta2^n)) + eps) of each."""
    keys = config.optimizer
    correction = 1.0 - keys.beta2 ** max(1, optimizer_updates(stepper.optimizer))
    slices = list(optimizer_slices(stepper.optimizer))
    scales = [
        ((piece.tensors["exp_avg_sq"] / correction).sqrt() + keys.eps).rsqrt().view_as(piece.parameter)
        for piece in slices
    ]
    return [piece.parameter for piece in slices], scales


def _clean(rows: ScoredRows, index: npt.NDArray[np.int64]) -> CleanBatch:
    boundaries = None if rows.cu_seqlens is None else [rows.cu_seqlens[row] for row in index.tolist()]
    position = BatchPosition(0, len(rows.tokens_RL))
    return CleanBatch(rows.tokens_RL[index], rows.is_maskable_RL[index], index, position, cu_seqlens=boundaries)


def _backward(stepper: Stepper, batch: CorruptedBatch) -> list[Any]:
    for chunk in stepper.chunks:
        chunk.zero_grad_buffer()
    return stepper.predict([batch], forward_only=False)


def _row_losses(batch: CorruptedBatch, nll_M: npt.NDArray[Any], maskable_B: npt.NDArray[np.int64]) -> FloatArray:
    row_M = batch.positions_M // batch.tokens_BL.shape[1]
    sums_B = np.bincount(row_M, weights=batch.weights_M * nll_M.astype(np.float64), minlength=len(maskable_B))
    return np.asarray(sums_B / np.maximum(maskable_B, 1))

"""Language-model head and cross-entropy at the predicted positions only, in chunks, vocabulary-parallel.

A masked-diffusion step scores only the masked positions, about half of them at t = 0.5, and the logits of all
positions are its largest tensor by far. Here no more than one chunk of logits exists at a time: the loss is linear in
each position's negative log-likelihood with weights that the host knows beforehand, so the gradients are formed in the
forward pass, chunk by chunk, and the backward pass only scales them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


@dataclass(frozen=True)
class Prediction:
    """Where to predict what, on the model's device.

    Attributes:
        positions_M: flat positions `b * L + l`, int64.
        targets_M: token ids, int64.
        weights_M: weight of each position's negative log-likelihood, fp32.
    """

    positions_M: torch.Tensor
    targets_M: torch.Tensor
    weights_M: torch.Tensor


@dataclass(frozen=True)
class PredictionLoss:
    """What the head returns for one micro-batch.

    Attributes:
        loss: `sum_m weights_M[m] * nll_M[m]`, fp32 scalar with a gradient.
        nll_M: negative log-likelihood of each target in nats, fp32, detached.
    """

    loss: torch.Tensor
    nll_M: torch.Tensor


def select_hidden(
    hidden_LBH: torch.Tensor, positions_M: torch.Tensor, *, sequence_parallel: bool, tp_group: Any
) -> torch.Tensor:
    """Hidden states [M, H] at flat positions `b * L + l` of hidden states [L, B, H] ([L/TP, B, H] under SP).

    The gradient that comes back is a partial sum (each rank holds a part of the vocabulary): it is added up over
    the tensor-parallel ranks here.
    """
    if sequence_parallel:
        hidden_LBH = gather_from_sequence_parallel_region(hidden_LBH, tensor_parallel_output_grad=True, group=tp_group)
    length, rows, width = hidden_LBH.shape
    index_M = (positions_M % length) * rows + positions_M // length
    hidden_MH = hidden_LBH.reshape(length * rows, width).index_select(0, index_M)
    return hidden_MH if sequence_parallel else copy_to_tensor_model_parallel_region(hidden_MH, group=tp_group)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum_m w_m * CE(softmax(h_m W^T), target_m) with W split by rows over `tp_group`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_M: torch.Tensor,
        weights_M: torch.Tensor,
        first_token: int,
        excluded: torch.Tensor,
        chunk: int,
        tp_group: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_grad = any(ctx.needs_input_grad[:2])
        nll_M = torch.empty(len(hidden_MH), dtype=torch.float32, device=hidden_MH.device)
        grad_hidden = torch.empty_like(hidden_MH) if needs_grad else None
        grad_weight = torch.zeros(weight_VH.shape, dtype=torch.float32, device=weight_VH.device) if needs_grad else None
        for start in range(0, len(hidden_MH), chunk):
            part = slice(start, min(start + chunk, len(hidden_MH)))
            hidden = hidden_MH[part]
            logits = (hidden @ weight_VH.t()).float().index_fill_(1, excluded, float("-inf"))
            nll_M[part], probabilities, column, is_local = _vocab_parallel_nll(
                logits, targets_M[part], first_token, tp_group
            )
            if grad_hidden is None or grad_weight is None:
                continue
            weights = weights_M[part]
            grad_logits = probabilities.mul_(weights[:, None])
            grad_logits[torch.arange(len(column), device=column.device), column] -= weights * is_local
            grad_logits = grad_logits.to(weight_VH.dtype)
            torch.mm(grad_logits, weight_VH, out=grad_hidden[part])
            if weight_VH.dtype is torch.float32:
                grad_weight.addmm_(grad_logits.t(), hidden)
            else:
                grad_weight += grad_logits.t() @ hidden
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VH.dtype))
        ctx.mark_non_differentiable(nll_M)
        return torch.dot(weights_M, nll_M), nll_M

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, grad_nll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # Each is used once, so it is scaled in place.
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None, None, None, None, None


def _vocab_parallel_nll(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, first_token: int, tp_group: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods [C] and probabilities [C, V] (in place of the logits) over the whole vocabulary.

    Also each target's column in this rank's part of the vocabulary, and whether it lies in that part at all (else the
    column is 0): shapes must not depend on data, or the host would wait for the GPU.
    """
    parallel = tp_group is not None and tp_group.size() > 1
    maximum_C = logits_CV.amax(dim=1)
    if parallel:
        dist.all_reduce(maximum_C, op=dist.ReduceOp.MAX, group=tp_group)
    logits_CV.sub_(maximum_C[:, None])
    column_C = targets_C - first_token
    is_local_C = (column_C >= 0) & (column_C < logits_CV.shape[1])
    column_C = torch.where(is_local_C, column_C, 0)
    target_logit_C = torch.where(is_local_C, logits_CV.gather(1, column_C[:, None]).squeeze(1), 0.0)
    logits_CV.exp_()
    sums_2C = torch.stack((logits_CV.sum(dim=1), target_logit_C))
    if parallel:
        dist.all_reduce(sums_2C, group=tp_group)
    logits_CV.div_(sums_2C[0][:, None])
    return sums_2C[0].log() - sums_2C[1], logits_CV, column_C, is_local_C


def masked_cross_entropy(
    hidden_MH: torch.Tensor,
    weight_VH: torch.Tensor,
    prediction: Prediction,
    *,
    first_token: int,
    excluded: torch.Tensor,
    chunk: int,
    tp_group: Any = None,
) -> PredictionLoss:
    """Weighted sum of cross-entropies at the predicted positions.

    Args:
        hidden_MH: final hidden states at the predicted positions.
        weight_VH: this rank's rows of the output weight (or of the tied embedding).
        prediction: targets and weights.
        first_token: token id of the first of those rows.
        excluded: row numbers of `weight_VH` that can never be predicted (vocabulary padding, the mask token).
        chunk: positions per chunk; the peak memory is chunk x V fp32.
        tp_group: group over which the vocabulary is split.

    Returns:
        The loss and each position's negative log-likelihood. With no position at all the loss is 0 and every
        parameter still receives a (zero) gradient, so that gradient reductions stay in step.
    """
    loss, nll_M = _ChunkedCrossEntropy.apply(
        hidden_MH, weight_VH, prediction.targets_M, prediction.weights_M, first_token, excluded, chunk, tp_group
    )
    return PredictionLoss(loss, nll_M)

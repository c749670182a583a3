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
        is_weight_shared: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nll_M = torch.empty(len(hidden_MH), dtype=torch.float32, device=hidden_MH.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_MH) if needs_hidden else None
        # A frozen weight has none.
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        score = _score_in_few_passes if hidden_MH.is_cuda else _score_in_place
        for start in range(0, len(hidden_MH), chunk):
            part = slice(start, min(start + chunk, len(hidden_MH)))
            hidden = hidden_MH[part]
            logits = (hidden @ weight_VH.t()).index_fill_(1, excluded, float("-inf"))
            nll_M[part], grad_logits = score(
                logits, weights_M[part], *_local(targets_M[part], first_token, logits), tp_group
            )
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VH, out=grad_hidden[part])
            if grad_weight is None:
                continue
            if weight_VH.dtype is torch.float32:
                grad_weight.addmm_(grad_logits.t(), hidden)
            else:
                grad_weight += grad_logits.t() @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight, ctx.is_weight_shared = weight_VH, is_weight_shared
        ctx.mark_non_differentiable(nll_M)
        return torch.dot(weights_M, nll_M), nll_M

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, grad_nll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # Each is used once, so it is scaled in place.
        if grad_weight is not None:
            grad_weight = _handed_over(ctx.weight, grad_weight.mul_(grad_loss), ctx.is_weight_shared)
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


def _handed_over(weight: torch.Tensor, grad: torch.Tensor, is_shared: bool) -> torch.Tensor | None:
    """What autograd gets for a gradient in fp32: it is added to megatron-core's buffer here, where there is one.

    Through autograd it would be rounded to the weight's type, and copied. megatron-core takes a gradient as ready when
    autograd has one: for a weight that is used here only it gets an empty one, for a shared one that of the other use.
    """
    if not hasattr(weight, "main_grad"):
        return grad.to(weight.dtype)
    weight.main_grad.add_(grad)
    if is_shared:
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


def _local(targets_C: torch.Tensor, first_token: int, logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target's column in this rank's part of the vocabulary, and whether it lies there at all.

    Else the column is 0: shapes must not depend on data, or the host would wait for the GPU.
    """
    column_C = targets_C - first_token
    is_local_C = (column_C >= 0) & (column_C < logits_CV.shape[1])
    return torch.where(is_local_C, column_C, 0), is_local_C


def _score_in_place(
    logits_CV: torch.Tensor, weights_C: torch.Tensor, column_C: torch.Tensor, is_local_C: torch.Tensor, tp_group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods [C] over the whole vocabulary, and the weighted loss's gradient by the logits [C, V].

    Operator by operator, in place of the logits: the CPU's caches like it, and nothing needs a compiler.
    """
    exact_CV = logits_CV.float()
    maximum_C = _reduced(exact_CV.amax(dim=1), dist.ReduceOp.MAX, tp_group)
    exact_CV.sub_(maximum_C[:, None])
    target_logit_C = torch.where(is_local_C, exact_CV.gather(1, column_C[:, None]).squeeze(1), 0.0)
    exact_CV.exp_()
    sums_2C = _reduced(torch.stack((exact_CV.sum(dim=1), target_logit_C)), dist.ReduceOp.SUM, tp_group)
    grad_CV = exact_CV.div_(sums_2C[0][:, None]).mul_(weights_C[:, None])
    grad_CV[torch.arange(len(column_C), device=column_C.device), column_C] -= weights_C * is_local_C
    return sums_2C[0].log() - sums_2C[1], grad_CV.to(logits_CV.dtype)


def _score_in_few_passes(
    logits_CV: torch.Tensor, weights_C: torch.Tensor, column_C: torch.Tensor, is_local_C: torch.Tensor, tp_group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in three reads and one write of the logits as they are, for a device that compiles."""
    maximum_C = _reduced(logits_CV.amax(dim=1).float(), dist.ReduceOp.MAX, tp_group)
    sums_2C = _reduced(_sums_in_one_pass(logits_CV, maximum_C, column_C, is_local_C), dist.ReduceOp.SUM, tp_group)
    grad_CV = _gradient_in_one_pass(logits_CV, maximum_C, sums_2C[0], weights_C, column_C, is_local_C)
    return sums_2C[0].log() - sums_2C[1], grad_CV


def exponential_sums(
    logits_CV: torch.Tensor, maximum_C: torch.Tensor, column_C: torch.Tensor, is_local_C: torch.Tensor
) -> torch.Tensor:
    """This rank's part of sum_v exp(z_v - max) and of z_target - max, fp32 [2, C]."""
    shifted_CV = logits_CV.float() - maximum_C[:, None]
    target_logit_C = torch.where(is_local_C, shifted_CV.gather(1, column_C[:, None]).squeeze(1), 0.0)
    return torch.stack((shifted_CV.exp().sum(dim=1), target_logit_C))


def logit_gradient(
    logits_CV: torch.Tensor,
    maximum_C: torch.Tensor,
    sum_C: torch.Tensor,
    weights_C: torch.Tensor,
    column_C: torch.Tensor,
    is_local_C: torch.Tensor,
) -> torch.Tensor:
    """The weighted loss's gradient w (softmax(z) - onehot(target)), in the logits' data type."""
    probabilities_CV = (logits_CV.float() - maximum_C[:, None]).exp() / sum_C[:, None]
    columns_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    is_target_CV = (columns_V == column_C[:, None]) & is_local_C[:, None]
    return ((probabilities_CV - is_target_CV.float()) * weights_C[:, None]).to(logits_CV.dtype)


_sums_in_one_pass = torch.compile(exponential_sums)
_gradient_in_one_pass = torch.compile(logit_gradient)


def _reduced(figures: torch.Tensor, operation: Any, tp_group: Any) -> torch.Tensor:
    if tp_group is not None and tp_group.size() > 1:
        dist.all_reduce(figures, op=operation, group=tp_group)
    return figures


def masked_cross_entropy(
    hidden_MH: torch.Tensor,
    weight_VH: torch.Tensor,
    prediction: Prediction,
    *,
    first_token: int,
    excluded: torch.Tensor,
    chunk: int,
    tp_group: Any = None,
    is_weight_shared: bool = False,
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
        is_weight_shared: another operation of this model chunk uses the weight as well.

    Returns:
        The loss and each position's negative log-likelihood. With no position at all the loss is 0 and every
        parameter still receives a (zero) gradient, so that gradient reductions stay in step.
    """
    loss, nll_M = _ChunkedCrossEntropy.apply(
        hidden_MH,
        weight_VH,
        prediction.targets_M,
        prediction.weights_M,
        first_token,
        excluded,
        chunk,
        tp_group,
        is_weight_shared,
    )
    return PredictionLoss(loss, nll_M)

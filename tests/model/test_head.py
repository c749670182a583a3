"""The chunked head against a dense cross-entropy: values, gradients, vocabulary parallelism, nothing to predict."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from megatron_md.model import head
from megatron_md.model.head import Prediction, masked_cross_entropy, select_hidden
from tests.ranks import run_ranks

VOCAB, WIDTH = 37, 8


def example(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Prediction]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, WIDTH, generator=generator)
    weight = torch.randn(VOCAB + 3, WIDTH, generator=generator)
    # 36 is excluded below, as the mask token is: it is never a target.
    targets = torch.randint(0, VOCAB - 1, (count,), generator=generator)
    return hidden, weight, Prediction(torch.arange(count), targets, torch.rand(count, generator=generator) * 3)


EXCLUDED = torch.tensor([36, 37, 38, 39])


def dense(hidden: torch.Tensor, weight: torch.Tensor, prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (hidden @ weight.t()).index_fill(1, EXCLUDED, float("-inf"))
    nll = F.cross_entropy(logits, prediction.targets_M, reduction="none")
    return (prediction.weights_M * nll).sum(), nll


@pytest.mark.parametrize("chunk", [1, 4, 7, 1000])
def test_equals_dense_cross_entropy(chunk: int) -> None:
    hidden, weight, prediction = example(11)
    hidden.requires_grad_(), weight.requires_grad_()
    expected, nll = dense(hidden, weight, prediction)
    (3.0 * expected).backward()
    expected_grads = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    got = masked_cross_entropy(hidden, weight, prediction, first_token=0, excluded=EXCLUDED, chunk=chunk)
    (3.0 * got.loss).backward()
    torch.testing.assert_close(got.loss, expected)
    torch.testing.assert_close(got.nll_M, nll.detach())
    torch.testing.assert_close(hidden.grad, expected_grads[0])
    torch.testing.assert_close(weight.grad, expected_grads[1])


def test_gradient_of_excluded_rows_is_zero_and_gradcheck_holds() -> None:
    hidden, weight, prediction = example(5)
    weight.requires_grad_()
    masked_cross_entropy(hidden, weight, prediction, first_token=0, excluded=EXCLUDED, chunk=2).loss.backward()
    assert weight.grad is not None
    assert torch.all(weight.grad[EXCLUDED] == 0) and torch.any(weight.grad[:36] != 0)


def test_uniform_model_scores_log_of_the_predictable_vocabulary() -> None:
    hidden, weight, prediction = example(9)
    got = masked_cross_entropy(hidden, 0 * weight, prediction, first_token=0, excluded=EXCLUDED, chunk=4)
    torch.testing.assert_close(got.nll_M, torch.full((9,), math.log(36)))


def test_nothing_to_predict_still_gives_every_parameter_a_gradient() -> None:
    hidden, weight, prediction = example(0)
    hidden.requires_grad_(), weight.requires_grad_()
    got = masked_cross_entropy(hidden, weight, prediction, first_token=0, excluded=EXCLUDED, chunk=4)
    got.loss.backward()
    assert got.loss == 0.0 and torch.equal(weight.grad, torch.zeros_like(weight)) and hidden.grad.shape == (0, WIDTH)


def test_select_hidden_takes_flat_positions_of_rows(world: object) -> None:
    from megatron.core import parallel_state

    hidden_LBH = torch.arange(3 * 2 * 4, dtype=torch.float32).reshape(3, 2, 4)
    got = select_hidden(
        hidden_LBH,
        torch.tensor([0, 2, 4]),
        sequence_parallel=False,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    assert torch.equal(got, torch.stack((hidden_LBH[0, 0], hidden_LBH[2, 0], hidden_LBH[1, 1])))


def test_bf16_keeps_weights_and_nll_in_fp32() -> None:
    hidden, weight, prediction = example(6)
    got = masked_cross_entropy(
        hidden.bfloat16(), weight.bfloat16(), prediction, first_token=0, excluded=EXCLUDED, chunk=4
    )
    _, nll = dense(hidden.bfloat16().float(), weight.bfloat16().float(), prediction)
    assert got.loss.dtype is torch.float32
    torch.testing.assert_close(got.nll_M, nll, rtol=2e-2, atol=2e-2)


def vocabulary_parallel(counts: list[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Loss, hidden gradient and this rank's weight gradient for batches of several sizes, vocabulary cut in two."""
    import torch.distributed as dist

    from megatron_md import parallel
    from megatron_md.config import Config, ParallelConfig

    results = []
    with parallel.session(Config(parallel=ParallelConfig(tensor=2))) as world:
        rows = (VOCAB + 3) // 2
        start = rows * world.rank
        for count in counts:
            hidden, weight, prediction = example(count)
            part = weight[start : start + rows].clone().requires_grad_()
            hidden.requires_grad_()
            excluded = EXCLUDED[(start <= EXCLUDED) & (start + rows > EXCLUDED)] - start
            got = masked_cross_entropy(
                hidden, part, prediction, first_token=start, excluded=excluded, chunk=4, tp_group=dist.group.WORLD
            )
            got.loss.backward()
            assert hidden.grad is not None and part.grad is not None
            dist.all_reduce(hidden.grad)
            results.append((got.loss.detach(), hidden.grad, part.grad))
    return results


@pytest.mark.distributed
def test_vocabulary_parallel_equals_one_process_for_varying_chunk_counts() -> None:
    counts = [11, 3, 0, 8]
    ranks = run_ranks(vocabulary_parallel, 2, counts)
    for number, count in enumerate(counts):
        hidden, weight, prediction = example(count)
        hidden.requires_grad_(), weight.requires_grad_()
        loss, _ = dense(hidden, weight, prediction)
        loss.backward()
        for rank in ranks:
            torch.testing.assert_close(rank[number][0], loss.detach())
            torch.testing.assert_close(rank[number][1], hidden.grad)
        torch.testing.assert_close(torch.cat([rank[number][2] for rank in ranks]), weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_functions_that_cuda_compiles_score_as_the_cpu_does(dtype: torch.dtype) -> None:
    hidden, weight, prediction = example(11)
    logits = (hidden @ weight.t()).to(dtype).index_fill_(1, EXCLUDED, float("-inf"))
    # This rank has the tokens 5 to 44 of a vocabulary of which others have the rest.
    column, is_local = head._local(prediction.targets_M, 5, logits)
    assert 0 < is_local.sum() < 11
    arguments = prediction.weights_M, column, is_local, None
    expected_nll, expected_grad = head._score_in_place(logits.clone(), *arguments)
    with mock.patch.multiple(head, _sums_in_one_pass=head.exponential_sums, _gradient_in_one_pass=head.logit_gradient):
        nll, grad = head._score_in_few_passes(logits, *arguments)
    torch.testing.assert_close(nll, expected_nll)
    torch.testing.assert_close(grad, expected_grad)
    assert grad.dtype is dtype


class Buffered(torch.nn.Parameter):
    """A weight with megatron-core's gradient buffer."""

    main_grad: torch.Tensor
    grad_added_to_main_grad = False


@pytest.mark.parametrize("is_shared", [False, True])
def test_the_weights_gradient_goes_into_megatron_cores_buffer_in_fp32(is_shared: bool) -> None:
    hidden, weight, prediction = (x.bfloat16() if isinstance(x, torch.Tensor) else x for x in example(11))
    plain = weight.clone().requires_grad_()
    masked_cross_entropy(hidden, plain, prediction, first_token=0, excluded=EXCLUDED, chunk=4).loss.backward()
    buffered = Buffered(weight.clone())
    buffered.main_grad = torch.ones(weight.shape)
    loss = masked_cross_entropy(
        hidden, buffered, prediction, first_token=0, excluded=EXCLUDED, chunk=4, is_weight_shared=is_shared
    ).loss
    other_use = buffered[3].float().sum()
    (loss + other_use if is_shared else loss).backward()
    assert buffered.grad is not None and plain.grad is not None
    # More exact than what autograd gets, to which it is rounded.
    torch.testing.assert_close((buffered.main_grad - 1.0).bfloat16(), plain.grad)
    assert not torch.equal(buffered.main_grad - 1.0, plain.grad.float())
    assert buffered.grad_added_to_main_grad is not is_shared
    if is_shared:
        torch.testing.assert_close(buffered.grad, torch.zeros_like(weight).index_fill_(0, torch.tensor([3]), 1.0))

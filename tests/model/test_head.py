"""The chunked head against a dense cross-entropy: values, gradients, vocabulary parallelism, nothing to predict."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

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

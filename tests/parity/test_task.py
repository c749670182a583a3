"""The (n, k) task: labels, the sets, and the order of the rows."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_md.batch import BatchPosition
from megatron_md.data.stream import micro_batches
from megatron_md.parity.task import ParityStream, ParityTask, distinct_inputs, secret_positions
from tests.parity.parity_config import small


def numbers(tokens_BL: np.ndarray) -> list[int]:
    """The inputs as numbers, labels left out."""
    return (tokens_BL[:, :-1] @ (1 << np.arange(tokens_BL.shape[1] - 1))).tolist()


def test_a_label_is_the_product_of_the_secret_signs() -> None:
    task = ParityTask.of(small(task={"n": 9, "k": 4, "train_samples": 300, "valid_samples": 100}))
    assert (
        task.train_tokens is not None and task.train_tokens.shape == (300, 10) and task.valid_tokens.shape == (100, 10)
    )
    for tokens_BL in (task.train_tokens, task.valid_tokens):
        sign_BL = 1 - 2 * tokens_BL
        np.testing.assert_array_equal(sign_BL[:, -1], sign_BL[:, list(task.secret)].prod(axis=1))
        assert 0.3 < tokens_BL[:, -1].mean() < 0.7
    assert task.signal_positions == (*task.secret, 9)


def test_training_and_held_out_inputs_are_distinct_and_disjoint() -> None:
    # All of them: every input of 6 bits is in exactly one set.
    task = ParityTask.of(small(task={"n": 6, "k": 2, "train_samples": 40, "valid_samples": 24}))
    assert task.train_tokens is not None
    assert sorted(numbers(task.train_tokens) + numbers(task.valid_tokens)) == list(range(64))


def test_everything_depends_on_the_seed_and_a_task_seed_fixes_it() -> None:
    tasks = [ParityTask.of(small(seed=seed, task={"n": 20, "k": 6})) for seed in (1, 1, 2)]
    secrets = [task.secret for task in tasks]
    assert secrets[0] == secrets[1] != secrets[2]
    assert numbers(tasks[0].valid_tokens) == numbers(tasks[1].valid_tokens) != numbers(tasks[2].valid_tokens)
    fixed = [ParityTask.of(small(seed=seed, task={"n": 20, "k": 6, "seed": 7})) for seed in (1, 2)]
    assert fixed[0].secret == fixed[1].secret and numbers(fixed[0].valid_tokens) == numbers(fixed[1].valid_tokens)


def test_a_larger_training_set_holds_the_smaller_one() -> None:
    np.testing.assert_array_equal(distinct_inputs(3, 20, 5000)[:700], distinct_inputs(3, 20, 700))
    inputs = distinct_inputs(3, 62, 1000)
    assert len(set(inputs.tolist())) == 1000 and inputs.max() < 2**62 and inputs.max() > 2**61


def test_every_position_is_equally_often_secret() -> None:
    counts = np.bincount(np.concatenate([secret_positions(seed, 10, 3) for seed in range(2000)]), minlength=10)
    # Each count is binomial(2000, 0.3): a standard deviation of 20.5.
    assert np.all(np.abs(counts - 600) < 4.5 * 20.5)
    assert all(len(set(secret_positions(seed, 10, 3))) == 3 for seed in range(50))


def test_an_epoch_serves_every_row_once_in_an_order_of_its_own() -> None:
    task = ParityTask.of(small())
    assert task.train_tokens is not None
    stream = ParityStream(task, seed=1)
    epochs = [stream.rows(range(40 * epoch, 40 * epoch + 40)).tokens_BL for epoch in range(3)]
    assert all(sorted(numbers(rows)) == sorted(numbers(task.train_tokens)) for rows in epochs)
    assert len({tuple(numbers(rows)) for rows in epochs}) == 3
    # A batch may span epochs, and any g is served at once.
    np.testing.assert_array_equal(stream.rows(range(30, 90)).tokens_BL, np.concatenate(epochs)[30:90])
    np.testing.assert_array_equal(ParityStream(task, seed=1).rows([85, 2]).tokens_BL, np.concatenate(epochs)[[85, 2]])


def test_fresh_rows_never_end_are_labelled_and_avoid_the_held_out_set() -> None:
    task = ParityTask.of(small(task={"n": 6, "k": 2, "train_samples": None, "valid_samples": 60}))
    rows = ParityStream(task, seed=1).rows(range(100, 400)).tokens_BL
    assert set(numbers(rows)) == set(range(64)) - set(numbers(task.valid_tokens))
    sign_BL = 1 - 2 * rows
    np.testing.assert_array_equal(sign_BL[:, -1], sign_BL[:, list(task.secret)].prod(axis=1))
    np.testing.assert_array_equal(ParityStream(task, seed=1).rows([399, 100]).tokens_BL, rows[[299, 0]])


@pytest.mark.parametrize("samples", [40, None])
def test_a_global_batch_is_the_same_on_every_split(samples: int | None) -> None:
    task = ParityTask.of(small(task={"train_samples": samples}))
    position = BatchPosition(64, 16)

    def tokens_by_index(data_size: int, micro_batch_size: int) -> dict[int, list[int]]:
        served: dict[int, list[int]] = {}
        for rank in range(data_size):
            stream = ParityStream(task, seed=1)
            for batch in micro_batches(stream, position, micro_batch_size, data_rank=rank, data_size=data_size):
                served |= dict(zip(batch.sample_index_B.tolist(), batch.tokens_BL.tolist(), strict=True))
                assert batch.is_maskable_BL.all()
        return served

    assert tokens_by_index(1, 16) == tokens_by_index(2, 4) == tokens_by_index(4, 1)

"""Progress counts rows exactly, also while the batch grows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_md.config import BatchRampConfig, Config, TrainConfig
from megatron_md.train.progress import Progress, batch_size_at, row_length_at, rows_before
from tests.small_run import CONFIG, LENGTH, variant


def test_constant_batches() -> None:
    progress = Progress.start(CONFIG)
    for _ in range(3):
        progress = progress.after(CONFIG)
    assert (progress.step, progress.next_sample_index, progress.tokens) == (3, 24, 24 * LENGTH)
    assert progress.total_tokens == CONFIG.train.steps * 8 * LENGTH


def test_ramp_rises_by_increments_to_the_full_size() -> None:
    config = variant(train={"batch_ramp": BatchRampConfig(start=2, increment=2, steps=9), "steps": 12})
    sizes = [batch_size_at(config, step) for step in range(12)]
    assert sizes == [2, 2, 2, 4, 4, 4, 6, 6, 6, 8, 8, 8]
    progress = Progress.start(config)
    assert progress.total_tokens == sum(sizes) * LENGTH
    for step in range(12):
        position = progress.batch_position(config)
        assert (position.first_sample_index, position.global_batch_size) == (sum(sizes[:step]), sizes[step])
        assert position.progress == sum(sizes[:step]) / sum(sizes)
        progress = progress.after(config)
    assert progress.tokens == progress.total_tokens


def test_progress_of_a_prolonged_run_stays_within_one() -> None:
    progress = replace(Progress.start(CONFIG), tokens=10**9)
    assert progress.batch_position(CONFIG).progress == 1.0


def test_random_row_lengths_are_rare_even_and_a_function_of_seed_and_first_row() -> None:
    config = variant(data={"random_length_fraction": 0.25, "seq_length": 64}, parallel={"tensor": 4, "context": 3})
    assert config.parallel.row_unit == 12
    lengths = [row_length_at(config, 8 * step) for step in range(8000)]
    cut = [length for length in lengths if length != 64]
    # 64 is no multiple of 12, so that every cut row is shorter: binomial(8000, 1/4), standard deviation 38.7.
    assert abs(len(cut) - 2000) < 5 * 38.7
    counts = {length: cut.count(length) for length in set(cut)}
    assert set(counts) == {12, 24, 36, 48, 60}
    assert all(abs(count - len(cut) / 5) < 5 * 18 for count in counts.values())
    assert lengths == [row_length_at(config, 8 * step) for step in range(8000)]
    other = replace(config, seed=config.seed + 1)
    assert lengths != [row_length_at(other, 8 * step) for step in range(8000)]
    assert {row_length_at(CONFIG, g) for g in range(100)} == {LENGTH}


def test_cut_batches_count_their_own_tokens() -> None:
    config = variant(data={"random_length_fraction": 0.5}, train={"steps": 50})
    progress, tokens = Progress.start(config), 0
    for _ in range(50):
        tokens += 8 * row_length_at(config, progress.next_sample_index)
        progress = progress.after(config)
        assert progress.tokens == tokens
    assert progress.total_tokens == tokens < 50 * 8 * LENGTH


def test_rows_are_counted_without_the_steps() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        start, increment, ramp_steps, steps = (int(n) for n in random.integers(1, 40, 4))
        ramp = BatchRampConfig(start, increment, ramp_steps)
        config = Config(
            train=TrainConfig(steps=steps, global_batch_size=start + int(random.integers(50)), batch_ramp=ramp)
        )
        assert rows_before(config, steps) == sum(batch_size_at(config, step) for step in range(steps))
    ramp = BatchRampConfig(1, 1, 10**15)
    assert Progress.start(Config(train=TrainConfig(steps=10**15, batch_ramp=ramp))).total_tokens > 10**17

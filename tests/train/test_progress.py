"""Progress counts rows exactly, also while the batch grows."""

from __future__ import annotations

from dataclasses import replace

from megatron_md.config import BatchRampConfig
from megatron_md.train.progress import Progress, batch_size_at
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

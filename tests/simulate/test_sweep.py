"""Candidates of a sweep: sound layouts that fit by closed forms, without torch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_md.config import ConfigError, config_from_mapping
from megatron_md.run.estimate import memory_per_rank
from megatron_md.simulate.hardware import load_hardware
from megatron_md.simulate.roofline import Assumptions
from megatron_md.simulate.sweep import candidates

H100 = load_hardware("h100")
EIGHT_B = config_from_mapping(
    {
        "model": {"preset": "8b"},
        "data": {"seq_length": 4096},
        "train": {"precision": "bf16", "global_batch_size": 128, "micro_batch_size": 1},
        "parallel": {"vocab_multiple": 128},
    }
)


def test_candidates_fit_and_differ() -> None:
    found = candidates(EIGHT_B, 64, H100)
    sizes = [(layout.tensor, layout.pipeline, config.train.micro_batch_size) for config, layout in found]
    assert len(set(sizes)) == len(sizes) > 10
    for config, layout in found:
        assert layout.world == 64 == layout.tensor * layout.pipeline * layout.data
        assert config.parallel.sequence_parallel == (layout.tensor > 1)
        room = H100.memory_bytes - Assumptions().reserve_bytes
        assert memory_per_rank(config, layout).total <= 1.03 * room
        if config.train.recompute == "full":
            kept = replace(config, train=replace(config.train, recompute="none"))
            assert memory_per_rank(kept, layout).total > 1.03 * room


def test_a_smaller_device_leaves_fewer() -> None:
    small = replace(H100, memory_bytes=24e9)
    assert 0 < len(candidates(EIGHT_B, 64, small)) < len(candidates(EIGHT_B, 64, H100))
    assert candidates(EIGHT_B, 1, small) == []


def test_a_config_that_is_wrong_everywhere_is_refused() -> None:
    wrong = replace(EIGHT_B, objective=replace(EIGHT_B.objective, mask_schedule="nonsense"))
    with pytest.raises(ConfigError, match="mask_schedule"):
        candidates(wrong, 8, H100)

"""Fixtures that several packages' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_md import parallel
from megatron_md.config import Config, DataConfig, ModelConfig


@pytest.fixture(scope="session")
def small_config() -> Config:
    """A model small enough for milliseconds, with every dimension different."""
    return Config(
        model=ModelConfig(vocab=101, layers=2, hidden=32, heads=4, kv_heads=2, ffn=48),
        data=DataConfig(seq_length=16),
    )


@pytest.fixture(scope="session")
def world(small_config: Config) -> Iterator[parallel.World]:
    """This process as a job of one, for tests that build modules without starting ranks."""
    yield parallel.initialize(small_config)
    parallel.shutdown()

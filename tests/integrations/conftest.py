"""A corpus, and what our own trainer makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integrations.foreign_loop import small
from tests.ranks import run_ranks
from tests.train.test_trainer import metrics, pretrain, write_bigram_corpus


@pytest.fixture(scope="session")
def bigrams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpus")
    return {"train": write_bigram_corpus(folder / "train", 60, 0)}


@pytest.fixture(scope="session")
def ours(bigrams: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same run by our own trainer, in one process."""
    folder = tmp_path_factory.mktemp("ours")
    run_ranks(pretrain, 1, small(folder, bigrams))
    return metrics(folder)

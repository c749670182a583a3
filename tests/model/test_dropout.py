"""Dropout of the layers: off where it is 0 and in validation, the same after a resume and on tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.config import ResolvedConfig
from tests.ranks import run_ranks
from tests.small_run import small_run, variant
from tests.train.test_step import slow
from tests.train.test_trainer import (
    config_for,
    metrics,
    pretrain,
    pretrain_and_die_after,
    without_times,
    write_bigram_corpus,
)


def losses(config: ResolvedConfig) -> list[float]:
    """On a rank: losses of three steps, after which what several ranks hold is the same."""
    from megatron_md.checkpoint.replicas import compare
    from megatron_md.model.dropout import seed_dropout

    with small_run(config) as run:
        found = []
        for step in range(3):
            seed_dropout(config.seed, step * 8, run.world.data_rank)
            found += [row[0] for row in run.train(step, step + 1)]
        compare(run.chunks, run.optimizer, 3)
        return found


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"tensor": 2}, *slow({"tensor": 2, "sequence_parallel": True})], ids=str)
def test_it_changes_training_and_keeps_ranks_alike(layout: dict[str, Any]) -> None:
    without, within = (run_ranks(losses, 2, variant(train={"dropout": p}, parallel=layout)) for p in (0.0, 0.3))
    assert within[0] == within[1] and np.isfinite(within[0]).all()
    assert abs(within[0][0] - without[0][0]) > 1e-3
    if "sequence_parallel" not in layout:  # there each rank drops from its own positions
        alone = run_ranks(losses, 1, variant(train={"dropout": 0.3}))
        np.testing.assert_allclose(within[0], alone[0], rtol=1e-5)


@pytest.mark.distributed
def test_a_resumed_run_drops_the_same_and_validation_nothing(tmp_path: Path) -> None:
    corpora = {"train": write_bigram_corpus(tmp_path / "train", 60, 0)}
    corpora["valid"] = write_bigram_corpus(tmp_path / "valid", 10, 1)
    keys: dict[str, Any] = {"train": {"dropout": 0.3}}
    run_ranks(pretrain, 1, config_for(tmp_path / "whole", corpora, **keys))
    parts = config_for(tmp_path / "parts", corpora, checkpoint={"every_steps": 3}, **keys)
    run_ranks(pretrain_and_die_after, 1, parts, 4)
    run_ranks(pretrain, 1, parts)
    assert without_times(metrics(tmp_path / "parts")) == without_times(metrics(tmp_path / "whole"))
    run_ranks(pretrain, 1, config_for(tmp_path / "idle", corpora, optimizer={"lr": 1e-30}, **keys))
    first, last = (record["val_nelbo"] for record in metrics(tmp_path / "idle") if "val_nelbo" in record)
    assert first == last, "the same weights validate alike"

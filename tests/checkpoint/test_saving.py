"""Saving during whole runs: cadence, background, failures, starting from other runs."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_md.config import Config
from tests.ranks import RankError, run_ranks
from tests.train.test_trainer import config_for, metrics, pretrain, without_times, write_bigram_corpus


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "train": write_bigram_corpus(folder / "train", 60, 0),
        "valid": write_bigram_corpus(folder / "valid", 10, 1),
    }


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


@pytest.mark.distributed
def test_background_saves_change_nothing_and_tell_how_long_training_stood_still(
    tmp_path: Path, corpora: dict[str, str]
) -> None:
    keys = {"every_steps": 2, "keep_last": 1, "keep_best": 1, "asynchronous": True}
    run_ranks(pretrain, 2, config_for(tmp_path / "saves", corpora, checkpoint=keys, train={"steps": 7}))
    run_ranks(pretrain, 2, config_for(tmp_path / "none", corpora, train={"steps": 7}))
    assert without_times(metrics(tmp_path / "saves")) == without_times(metrics(tmp_path / "none"))
    saves = events(tmp_path / "saves", "saved")
    assert [save["step"] for save in saves] == [2, 4, 6, 7]
    assert all(0.0 < save["stall_seconds"] <= save["seconds"] for save in saves)
    # Validated steps are 4 and 7, of which the newest is the better one.
    assert saved_steps(tmp_path / "saves") == [7]
    assert sum(record["save_seconds"] for record in metrics(tmp_path / "saves")) > 0.0


def pretrain_with_clock(config: Config) -> int:
    """Train with a clock that goes on by 25 seconds per look on rank 0, and stands still elsewhere."""
    import time

    import torch.distributed as dist

    from megatron_md.checkpoint import saving as callback

    class Clock:
        now = 0.0
        perf_counter = staticmethod(time.perf_counter)

        def monotonic(self) -> float:
            self.now += 25.0 if dist.get_rank() == 0 else 0.0
            return self.now

    callback.time = Clock()  # type: ignore[assignment]
    return pretrain(config)


@pytest.mark.distributed
def test_saves_by_wall_time_follow_one_clock(tmp_path: Path, corpora: dict[str, str]) -> None:
    keys = {"every_minutes": 1.0, "keep_last": 9}
    run_ranks(pretrain_with_clock, 2, config_for(tmp_path, corpora, checkpoint=keys, train={"steps": 7}))
    # Looks at 25, 50, 75 s (a save, whose own look makes it 100 s), then at 125, 150, 175 s.
    assert saved_steps(tmp_path) == [3, 6, 7]


def pretrain_on_full_disk(config: Config, failures: int) -> int:
    """Train while the last rank's first writes fail."""
    import torch.distributed as dist

    from megatron_md.checkpoint import writer

    digest, left = writer.digest_files, [failures]

    def fail(*args: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1 and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return digest(*args)

    writer.digest_files = fail
    return pretrain(config)


@pytest.mark.distributed
@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_disk_stops_the_run_or_not_as_told(asynchronous: bool, tmp_path: Path, corpora: dict[str, str]) -> None:
    keys = {"every_steps": 2, "asynchronous": asynchronous, "on_error": "continue"}
    goes_on = config_for(tmp_path / "goes on", corpora, checkpoint=keys)
    assert run_ranks(pretrain_on_full_disk, 2, goes_on, 2) == [0, 0]
    assert saved_steps(tmp_path / "goes on") == [6, 8]
    assert ["rank 1: OSError" in event["error"] for event in events(tmp_path / "goes on", "save_failed")] == [True] * 2
    stops = config_for(tmp_path / "stops", corpora, checkpoint={**keys, "on_error": "stop"})
    with pytest.raises(RankError, match=r"SaveError: .*rank 1: OSError: \[Errno 28\] No space left on device"):
        run_ranks(pretrain_on_full_disk, 2, stops, 1)
    assert json.loads((tmp_path / "stops" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.distributed
def test_the_last_save_must_succeed(tmp_path: Path, corpora: dict[str, str]) -> None:
    config = config_for(tmp_path, corpora, checkpoint={"on_error": "continue"}, train={"steps": 2})
    with pytest.raises(RankError, match=r"SaveError: .*No space left"):
        run_ranks(pretrain_on_full_disk, 1, config, 1)


@pytest.mark.distributed
def test_a_run_starts_from_another_ones_weights_or_goes_on_where_it_stood(
    tmp_path: Path, corpora: dict[str, str]
) -> None:
    parent = config_for(tmp_path / "parent", corpora, train={"steps": 4})
    run_ranks(pretrain, 1, parent)
    source = {"load": str(tmp_path / "parent")}
    branch = config_for(tmp_path / "branch", corpora, checkpoint=source)
    run_ranks(pretrain, 1, branch)
    assert [record["step"] for record in metrics(tmp_path / "branch")] == [5, 6, 7, 8]
    (loaded,) = events(tmp_path / "branch", "loaded")
    assert loaded["changed"]["train.steps"] == [4, 8] and "optimizer.lr" not in loaded["changed"]
    tuned = config_for(tmp_path / "tuned", corpora, checkpoint={**source, "load_only": "model"})
    run_ranks(pretrain, 1, tuned)
    records = metrics(tmp_path / "tuned")
    assert [record["step"] for record in records] == list(range(1, 9))
    # The same first batch as the parent's, seen by a model that has learnt something.
    assert records[0]["loss"] < metrics(tmp_path / "parent")[0]["loss"] - 0.1
    # Its own checkpoint goes before `checkpoint.load` when it is started again.
    run_ranks(pretrain, 1, tuned)
    assert metrics(tmp_path / "tuned") == records

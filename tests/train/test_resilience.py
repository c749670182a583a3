"""Requests to stop: signals and RUN/stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_md.config import Config
from tests.ranks import run_ranks
from tests.train.test_launch import tensors_of
from tests.train.test_trainer import config_for, metrics, pretrain, write_bigram_corpus

TWICE = """
import os, signal
from megatron_md.train.resilience import StopRequest
request = StopRequest()
os.kill(os.getpid(), signal.SIGTERM)
print("one", request.signal, flush=True)
os.kill(os.getpid(), signal.SIGUSR1)
print("two")
"""


def test_a_second_signal_ends_the_process_at_once() -> None:
    result = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=60)
    assert result.returncode == 128 + 10 and result.stdout == "one 15\n"
    assert "second signal" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.distributed
def test_the_stop_file_stops_all_ranks_once(tmp_path: Path) -> None:
    corpora = {"train": write_bigram_corpus(tmp_path / "train", 30, 0)}
    config: Config = config_for(
        tmp_path / "run", corpora, train={"steps": 4}, parallel={"tensor": 2}, validation={"sequences": 0}
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    assert run_ranks(pretrain, 2, config) == [75, 75]
    assert len(metrics(tmp_path / "run")) == 1 and not (tmp_path / "run" / "stop").exists()
    assert '"signal": "the file stop"' in (tmp_path / "run" / "events.jsonl").read_text()
    assert run_ranks(pretrain, 2, config) == [0, 0]
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def stop_after(config: Config, step: int) -> int:
    """On each rank: train; rank 1 gets a SIGTERM while it makes this step."""
    from megatron_md.train.trainer import Trainer

    make_step = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> Any:
        if self.progress.step + 1 == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return make_step(self, batches)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    return pretrain(config)


@pytest.mark.distributed
def test_a_stop_and_other_cadences_change_nothing(tmp_path: Path) -> None:
    corpora = {name: write_bigram_corpus(tmp_path / name, 30, seed) for seed, name in enumerate(("train", "valid"))}
    keys: dict[str, Any] = {"train": {"steps": 8}, "parallel": {"distributed_optimizer": True}}
    run_ranks(pretrain, 2, config_for(tmp_path / "whole", corpora, **keys, checkpoint={"every_steps": 0}))
    config = config_for(tmp_path / "run", corpora, **keys, checkpoint={"every_steps": 2}, validation={"every_steps": 2})
    assert run_ranks(stop_after, 2, config, 3) == [75, 75]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000003"
    other = config_for(
        tmp_path / "run",
        corpora,
        **keys,
        checkpoint={"every_steps": 3, "asynchronous": True},
        validation={"every_steps": 5},
    )
    assert run_ranks(pretrain, 2, other) == [0, 0]
    keys_of_training = ("step", "loss", "masked_ce", "grad_norm", "lr")
    whole, run = (
        [{key: record[key] for key in keys_of_training} for record in metrics(tmp_path / name)]
        for name in ("whole", "run")
    )
    assert len(whole) == 8 and run == whole
    hashes = tensors_of(tmp_path / "whole" / "checkpoints" / "step_00000008")
    assert len(hashes) > 10 and tensors_of(tmp_path / "run" / "checkpoints" / "step_00000008") == hashes

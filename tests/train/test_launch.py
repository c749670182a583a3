"""`megatron-md train` with real worker processes: exit codes, Ctrl-C, a failing rank, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_md.config import as_dict
from tests.train.test_trainer import config_for, metrics, write_bigram_corpus


def start(config_file: Path, *words: str) -> subprocess.Popen[str]:
    """The command line itself, on two processes, as a terminal would start it."""
    command = [sys.executable, "-m", "megatron_md", "train", str(config_file), "--nproc-per-node", "2", *words]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    corpora = {name: write_bigram_corpus(tmp_path / name, 40, seed) for seed, name in enumerate(("train", "valid"))}
    config = config_for(tmp_path / "run", corpora, parallel={"tensor": 2}, train={"steps": 5000, "device": "cpu"})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(as_dict(config)))))
    return file


def wait_for_steps(run_dir: Path, process: subprocess.Popen[str], steps: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").is_file() and len(metrics(run_dir)) >= steps:
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"no {steps} steps: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.distributed
def test_ctrl_c_saves_on_all_ranks_and_the_same_command_goes_on(config_file: Path, tmp_path: Path) -> None:
    process = start(config_file)
    wait_for_steps(tmp_path / "run", process, 3)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 75, error
    assert error.count("stopped by SIGINT") == 1 and "Traceback" not in error
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    assert (tmp_path / "run" / "logs" / "rank_1.log").read_text().count("rank 1 of 2") == 1

    process = start(config_file, f"train.steps={summary['step'] + 2}")
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    assert "continues at step" in error
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, summary["step"] + 3))


@pytest.mark.distributed
def test_more_damage_than_tolerated_is_named_once_and_ends_the_run(config_file: Path, tmp_path: Path) -> None:
    # A flipped byte in a document.
    shard = tmp_path / "train" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(bytes(data))
    process = start(config_file, "train.steps=200", "data.window_shards=1", "data.max_quarantined=0")
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2, error
    assert error.count("shard-000000.tar document") == 1 and "data.max_quarantined" in error
    assert "Traceback" not in error
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "damaged documents" in summary["error"]
    assert "damaged documents" in (tmp_path / "run" / "logs" / "rank_0.log").read_text()


@pytest.mark.distributed
def test_a_run_does_not_go_on_with_another_seed(config_file: Path) -> None:
    process = start(config_file, "train.steps=2")
    assert process.communicate(timeout=120)[1] is not None and process.returncode == 0
    process = start(config_file, "train.steps=4", "seed=99")
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2, error
    assert error.count("belongs to another run (seed: 1234 there, 99 now)") == 1 and "Traceback" not in error

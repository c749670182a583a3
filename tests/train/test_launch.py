"""`megatron-md train` with real worker processes: exit codes, Ctrl-C, a failing rank, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
import yaml

from megatron_md.config import as_dict, load_config
from megatron_md.processes import scratch_folder
from tests.ranks import run_ranks
from tests.test_processes import left_after
from tests.train.test_trainer import config_for, metrics, pretrain, without_times, write_bigram_corpus


def start(
    config_file: Path, *words: str, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    """The command line itself, on two processes, as a terminal would start it."""
    command = [sys.executable, "-m", "megatron_md", "train", str(config_file), "--nproc-per-node", "2", *words]
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    # `imports` finds modules beside the config.
    inherited["PYTHONPATH"] = os.pathsep.join([str(config_file.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**inherited, **environment})


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
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.distributed
def test_shards_that_are_cut_during_training_end_the_run_by_their_names(config_file: Path, tmp_path: Path) -> None:
    process = start(config_file, "data.max_quarantined=0")
    wait_for_steps(tmp_path / "run", process, 3)
    for shard in (tmp_path / "train").glob("*.tar"):
        os.truncate(shard, 0)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "shard-00000" in error and "Traceback" not in error, error
    told = error + (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "the file ends at byte 0" in told or "0 bytes instead of" in told


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_does_not_go_on_with_another_seed(config_file: Path) -> None:
    process = start(config_file, "train.steps=2")
    assert process.communicate(timeout=120)[1] is not None and process.returncode == 0
    process = start(config_file, "train.steps=4", "seed=99")
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2, error
    assert error.count("belongs to another run (seed: 1234 there, 99 now)") == 1 and "Traceback" not in error


PLANTED = """
import os
from megatron_md.train.trainer import Trainer
train_step = Trainer.train_step
def planted(self, batches):
    if self.progress.step == 3 and os.environ.get("RANK") == "1":
        raise KeyError("planted")
    return train_step(self, batches)
Trainer.train_step = planted
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_the_first_traceback_is_the_only_one(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "planted_error.py").write_text(PLANTED)
    process = start(config_file, "imports=[planted_error]", "validation.sequences=0")
    wait_for_steps(tmp_path / "run", process, 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1, error
    assert error.count("Traceback") == 1 and error.count("KeyError: 'planted'") == 1
    assert (
        error.index("rank 1 failed at step 3") < error.index("Traceback") < error.index("rank 1 ended with exit code 1")
    )
    assert not alive(workers)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "rank 1 failed at step 3: KeyError" in summary["error"]
    assert "Traceback" in (tmp_path / "run" / "logs" / "rank_0.log").read_text()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def workers_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The worker processes of a launcher, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children():
        try:
            found[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stopped_rank_is_named_and_killed(config_file: Path, tmp_path: Path) -> None:
    process = start(config_file, "train.hang_timeout=8")
    wait_for_steps(tmp_path / "run", process, 3)
    workers = workers_of(process)
    workers[1].suspend()
    error = process.communicate(timeout=180)[1]
    assert process.returncode == 1, error
    assert error.count("rank 1 gives no sign of life") == 1 and "Traceback" not in error
    assert "rank 0 ended with exit code 1" in error
    assert not alive(list(workers.values()))
    assert "Thread" in (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "rank 1 gives no sign of life" in summary["error"]


def tensors_of(checkpoint: Path) -> dict[str, str]:
    """A hash of every tensor of a checkpoint, optimizer state included."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    state = _load_state_dict_from_keys(storage_reader=FileSystemReader(checkpoint))
    return {
        name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        for name, value in state.items()
        if hasattr(value, "numpy")
    }


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kills", [1, 10])
def test_kill_minus_nine_changes_nothing(kills: int, config_file: Path, tmp_path: Path) -> None:
    generator = random.Random(kills)
    words = [f"train.steps={20 * kills}", "checkpoint.every_steps=4", "train.max_skipped=0"]
    process = start(config_file, *words, "--max-restarts", str(kills))
    for kill in range(kills):
        run = tmp_path / "run"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            started = sum('"started"' in line for line in lines(run / "events.jsonl"))
            step = len(lines(run / "metrics.jsonl"))
            if started > kill and step > 15 * kill + 5 and len(workers_of(process)) == 2:
                break
            time.sleep(0.02)
        time.sleep(generator.random())
        workers_of(process)[generator.randrange(2)].kill()
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0, error
    assert error.count("megatron-md: restart") == kills

    whole = load_config(config_file, [*words, f"run_dir={tmp_path / 'whole'}"])
    assert run_ranks(pretrain, 2, whole, timeout=600) == [0, 0]
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(tmp_path / "whole"))
    last = f"checkpoints/step_{20 * kills:08d}"
    hashes = tensors_of(tmp_path / "run" / last)
    assert len(hashes) > 10 and hashes == tensors_of(tmp_path / "whole" / last)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("seconds", [0.3, 2.0, 6.0])
def test_a_launcher_that_is_killed_early_leaves_nothing(seconds: float, config_file: Path, tmp_path: Path) -> None:
    environment = {"TEST_MARKER": str(tmp_path), "TMPDIR": str(tmp_path)}
    process = start(config_file, environment=environment)
    time.sleep(seconds)
    process.kill()
    assert left_after(str(tmp_path)) == []
    process.communicate()
    process = start(config_file, "train.steps=2", environment=environment)
    assert process.communicate(timeout=120)[1] is not None and process.returncode == 0
    assert list(tmp_path.glob("megatron_md_*")) == []


@pytest.mark.distributed
def test_workers_end_with_a_launcher_that_is_killed_as_they_start(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(config_file, environment={"TEST_MARKER": str(tmp_path), "TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 120
    while len(workers_of(process)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert left_after(str(tmp_path)) == []
    process.communicate()
    (left,) = tmp_path.glob("megatron_md_*")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder():
        assert not left.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system needs privileges")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("on_error", "reached"), [("stop", 4), ("continue", 8)])
def test_a_disk_that_is_really_full_loses_nothing_that_was_saved(
    on_error: str, reached: int, config_file: Path, small_disk: Path
) -> None:
    run, filler = small_disk / "run", small_disk / "filler"
    filler.write_bytes(bytes(5_500_000))  # leaves room for one checkpoint of 1.9 MB
    words = [f"run_dir={run}", f"checkpoint.on_error={on_error}", "checkpoint.every_steps=2", "train.steps=8"]
    process = start(config_file, *words)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "Traceback" not in error, error
    assert "could not be written whole" in error or "No space left on device" in error
    assert [record["step"] for record in metrics(run)] == list(range(1, reached + 1))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    assert sum('"save_failed"' in line for line in lines(run / "events.jsonl")) >= (1 if on_error == "stop" else 3)

    filler.unlink()
    process = start(config_file, *words)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "continues at step 2" in error, error
    assert [record["step"] for record in metrics(run)] == list(range(1, 9))
    assert (run / "checkpoints" / "latest").read_text() == "step_00000008"

"""Runs over several nodes, each a launcher of its own, and what becomes of them when one is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_md.config import as_dict, load_config
from megatron_md.errors import RunFailedError
from megatron_md.train import nodes
from tests.ranks import run_ranks
from tests.train.test_launch import workers_of
from tests.train.test_trainer import config_for, metrics, pretrain, without_times, write_bigram_corpus

STEPS = 40
SLOW_STEP = """
import os, time
from megatron_md.train.trainer import Trainer
train_step = Trainer.train_step
def slow(self, batches):
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
    return train_step(self, batches)
Trainer.train_step = slow
"""


class Job:
    """Two launchers, each in a folder of its own; the first one holds the store."""

    def __init__(self, folder: Path, endpoint: str, *words: str, wrapped: Sequence[Sequence[str]] = ((), ())) -> None:
        self.run, self.folder, self.endpoint, self.words, self.wrapped = (
            folder / "run",
            folder,
            endpoint,
            words,
            wrapped,
        )
        corpora = {name: write_bigram_corpus(folder / name, 40, seed) for seed, name in enumerate(("train", "valid"))}
        config = config_for(
            self.run, corpora, train={"steps": STEPS, "device": "cpu"}, checkpoint={"every_steps": 4, "keep_last": 2}
        )
        (folder / "slow_step.py").write_text(SLOW_STEP)
        self.config = folder / "config.yaml"
        keys = {**json.loads(json.dumps(as_dict(config))), "imports": ["slow_step"]}
        self.config.write_text(yaml.safe_dump(keys))
        self.launchers: dict[int, subprocess.Popen[str]] = {}

    def start(self, node: int, **environment: str) -> subprocess.Popen[str]:
        """The command of one node."""
        home = self.folder / f"node_{node}"
        home.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "megatron_md", "train", str(self.config), "--nnodes", "2"]
        command += ["--nproc-per-node", "1", "--rdzv-endpoint", self.endpoint, "--max-restarts", "3", *self.words]
        known = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        known["PYTHONPATH"] = os.pathsep.join([str(self.folder), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        known |= {"STEP_SECONDS": "0.2", "OMP_NUM_THREADS": "1", **environment}
        with (home / "stderr").open("a") as stderr:
            process = subprocess.Popen([*self.wrapped[node], *command], stderr=stderr, text=True, env=known, cwd=home)
        self.launchers[node] = process
        return process

    def start_both(self, **environment: str) -> None:
        """Start the first, and the second once the store is there."""
        self.start(0, **environment)
        host, port = self.endpoint.rsplit(":", 1)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.launchers[0].poll() is None:
            wrapper = self.wrapped[0]
            probe = [*wrapper, sys.executable, "-c", f"import socket; socket.create_connection(('{host}', {port}), 1)"]
            if subprocess.run(probe, capture_output=True).returncode == 0:
                break
            time.sleep(0.3)
        self.start(1, **environment)

    def said(self, node: int) -> str:
        return (self.folder / f"node_{node}" / "stderr").read_text()

    def wait_for_steps(self, steps: int) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and all(process.poll() is None for process in self.launchers.values()):
            if (self.run / "metrics.jsonl").is_file() and len(metrics(self.run)) >= steps:
                return
            time.sleep(0.05)
        raise AssertionError(f"no {steps} steps:\n{self.said(0)}\n{self.said(1)}")

    def wait(self, *nodes: int, seconds: float = 300.0) -> list[int]:
        """The exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [self.launchers[node].wait(max(0.0, deadline - time.monotonic())) for node in nodes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended in {seconds} s:\n{self.said(0)}\n{self.said(1)}") from None

    def worker(self, node: int) -> psutil.Process:
        [worker] = workers_of(self.launchers[node]).values()
        return worker

    def kill_node(self, node: int) -> None:
        """As a machine dies: launcher and workers at once."""
        tree = [psutil.Process(self.launchers[node].pid), *psutil.Process(self.launchers[node].pid).children(True)]
        for process in tree:
            process.send_signal(signal.SIGSTOP)
        for process in tree:
            process.kill()
        self.launchers[node].wait()

    def end(self) -> None:
        for process in self.launchers.values():
            if process.poll() is None:
                for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                    child.kill()
                process.wait()

    def assert_equals_a_whole_run(self) -> None:
        whole = load_config(self.config, [f"run_dir={self.folder / 'whole'}", "imports=[]"])
        assert run_ranks(pretrain, 2, whole, timeout=600) == [0, 0]
        assert [record["step"] for record in metrics(self.run)] == list(range(1, STEPS + 1))
        assert without_times(metrics(self.run)) == without_times(metrics(self.folder / "whole"))


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path, f"127.0.0.1:{free_port()}")
    yield job
    job.end()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("node", [0, 1])
def test_a_killed_worker_is_replaced_and_changes_nothing(node: int, job: Job) -> None:
    job.start_both()
    job.wait_for_steps(10)
    job.worker(node).kill()
    assert job.wait(0, 1) == [0, 0], job.said(0) + job.said(1)
    assert "Traceback" not in job.said(0) + job.said(1)
    assert (job.said(0) + job.said(1)).count("megatron-md: restart 1, from step") == 1
    job.assert_equals_a_whole_run()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_node_that_dies_and_is_started_again_changes_nothing(job: Job) -> None:
    job.start_both()
    job.wait_for_steps(10)
    job.kill_node(1)
    time.sleep(5)
    job.start(1)
    assert job.wait(0, 1) == [0, 0], job.said(0) + job.said(1)
    assert "Traceback" not in job.said(0) + job.said(1)
    job.assert_equals_a_whole_run()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_without_the_node_of_the_store_the_others_say_what_to_do(job: Job) -> None:
    job.start_both()
    job.wait_for_steps(10)
    job.kill_node(0)
    assert job.wait(1, seconds=60) == [1]
    said = job.said(1)
    assert not any(word in said for word in ("Traceback", "DistStoreError", "Exception raised", "frame #"))
    assert (
        said.count(f"lost the node at {job.endpoint}, which holds the job's store: start the same command again") == 1
    )
    job.start_both()
    assert job.wait(0, 1) == [0, 0], job.said(0) + job.said(1)
    job.assert_equals_a_whole_run()


def test_any_address_of_this_machine_is_here() -> None:
    addresses = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries]
    mine = [address for address in addresses if address.count(".") == 3]
    assert mine and all(nodes._is_here(address) for address in [*mine, "127.0.0.2", "localhost", socket.gethostname()])
    assert not nodes._is_here("198.51.100.7")  # kept for examples


def test_a_host_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(RunFailedError, match=r"--rdzv-endpoint: nowhere\.invalid: "):
        nodes._is_here("nowhere.invalid")


def run_ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def two_namespaces() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces, 10.99.0.1 and 10.99.0.2 to one another through an interface `link0`."""
    names = tuple(f"nodes{os.getpid()}{side}" for side in "ab")
    try:
        for name in names:
            run_ip("netns", "add", name)
        run_ip("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link0", "netns", names[1])
        for number, name in enumerate(names, 1):
            run_ip("-n", name, "address", "add", f"10.99.0.{number}/24", "dev", "link0")
            for device in ("lo", "link0"):
                run_ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        pytest.skip(f"network namespaces are not to be had here: {getattr(error, 'stderr', None) or error}")
    yield names[0], names[1]
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_cut_link_ends_both_sides_which_name_what_they_lost(two_namespaces: tuple[str, str], tmp_path: Path) -> None:
    """The first node's address is not that of its hostname, either."""
    hang_timeout, endpoint = 20, "10.99.0.1:29500"
    wrapped = [("ip", "netns", "exec", name) for name in two_namespaces]
    job = Job(tmp_path, endpoint, f"train.hang_timeout={hang_timeout}", wrapped=wrapped)
    try:
        job.start_both(GLOO_SOCKET_IFNAME="link0")
        job.wait_for_steps(10)
        run_ip("-n", two_namespaces[0], "link", "set", "link0", "down")
        assert job.wait(0, 1, seconds=hang_timeout + 60) == [1, 1], job.said(0) + job.said(1)
        assert "Traceback" not in job.said(0) + job.said(1)
        assert "rank 1 gives no sign of life (stopped, or its machine is gone)" in job.said(0)
        assert f"lost the node at {endpoint}, which holds the job's store" in job.said(1)
        assert all(job.said(node).count("start the same command again on all nodes") == 1 for node in (0, 1))

        run_ip("-n", two_namespaces[0], "link", "set", "link0", "up")
        job.start_both(GLOO_SOCKET_IFNAME="link0")
        assert job.wait(0, 1) == [0, 0], job.said(0) + job.said(1)
        job.assert_equals_a_whole_run()
    finally:
        job.end()

"""`megatron-md train`: what it refuses before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_md.cli import main
from megatron_md.config import to_yaml
from tests.small_run import variant

TASKS = "SLURM_STEP_NUM_TASKS"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be started instead of being refused: `pretrain` here, or `launch` of workers."""
    calls: list[str] = []

    def start(name: str) -> Any:
        return lambda *args, **keys: calls.append(name) or 0  # type: ignore[func-returns-value]

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", TASKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("megatron_md.run.pretrain.pretrain", start("pretrain"))
    monkeypatch.setattr("megatron_md.train.launch.launch", start("launch"))
    monkeypatch.setattr("megatron_md.commands.train.check_config", lambda *args, **keys: None)
    return calls


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(to_yaml(variant()))
    return str(tmp_path / "run.yaml")


def test_several_tasks_of_srun_without_ranks_are_refused(
    started: list[str], config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TASKS, "4")
    assert main(["train", config_file]) == 2 and not started
    (line,) = capsys.readouterr().err.splitlines()
    assert "srun started 4 tasks without RANK and WORLD_SIZE: 4 runs in one directory" in line
    assert "start one task per node with --nnodes and --rdzv-endpoint" in line


@pytest.mark.parametrize(
    ("environment", "words", "call"),
    [
        ({TASKS: "1"}, [], "pretrain"),
        ({TASKS: "4", "RANK": "0", "WORLD_SIZE": "4"}, [], "pretrain"),
        ({TASKS: "4"}, ["--nnodes", "4", "--rdzv-endpoint", "node0:29500"], "launch"),
    ],
)
def test_jobs_of_which_the_tasks_know_are_not(
    environment: dict[str, str],
    words: list[str],
    call: str,
    started: list[str],
    config_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", config_file, *words]) == 0
    assert started == [call]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--nnodes", "2"], "--nnodes above 1 needs --rdzv-endpoint HOST:PORT"),
        (["--world-size", "8"], "--world-size belongs to --dry-run"),
    ],
)
def test_options_that_need_another_one_are_refused(
    words: list[str], text: str, started: list[str], config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", config_file, *words]) == 2 and not started
    assert text in capsys.readouterr().err

"""`megatron-md parity`: the actions, their refusals and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_md.cli import main
from megatron_md.config.loader import to_yaml
from tests.parity.parity_config import small


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "parity.yaml"
    path.write_text(to_yaml(small(tmp_path / "run", denoiser="uniform_attention", accuracy={"stop_at": 0.0})))
    return path


def test_run_leaves_a_directory_and_says_what_came_of_it(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", "run", str(config_file), "seed=3"]) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["reached_step"] == 2
    assert (tmp_path / "run/config.yaml").read_text().startswith(f"run_dir: {tmp_path / 'run'}\nseed: 3\n")
    assert "goal reached at step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "FILE", "task.k=7"], "FILE: task.k 7 is above task.n 6"),
        (["run", "FILE", "task.kk=7"], "command line: unknown key task.kk; did you mean task.k?"),
        (["run", "none.yaml"], "none.yaml: no such file"),
        (["sweep", "FILE", "sweep.arms={a: [task.k=9]}"], "sweep.arms[a]: task.k 9 is above task.n 6"),
        (["plot", "nowhere"], "nowhere/parity.csv: no such file; make it with `megatron-md parity sweep`"),
        (["validate", "seed=2"], "seed=2: the run is recorded; only parallel."),
        (["validate", "parallel.tensor=2"], "the layout needs 2 processes"),
        (["validate", "--reference", "none.json"], "none.json: no such file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    words: list[str], message: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", *(word.replace("FILE", str(config_file)) for word in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megatron-md: {message.replace('FILE', str(config_file))}") and error.count("\n") == 1


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["parity", "run", "--help"])
    text = capsys.readouterr().out
    for key in ("task.train_samples:", "accuracy.stop_at:", "sweep.arms:", "objective.mask_schedule:"):
        assert key in text

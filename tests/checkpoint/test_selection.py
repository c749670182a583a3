"""Which checkpoints `--last`, `--best` and `--steps` mean, and what is said where they are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_md.checkpoint.directory import Retention, set_aside_as_bad
from megatron_md.checkpoint.selection import select
from megatron_md.errors import UserError
from tests.checkpoint.test_directory import write_checkpoint

NELBOS = {100: 3.0, 200: 2.5, 300: None, 400: 2.5, 500: 2.0, 600: 2.75}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoints"
    for step, nelbo in NELBOS.items():
        write_checkpoint(directory, step, Retention(9), val_nelbo=nelbo)
    set_aside_as_bad(directory / "step_00000500")  # the best, which the run itself has given up
    (directory / "step_00000600" / "manifest.json").unlink()
    return tmp_path


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"last": 1}, [400]),
        ({"last": 3}, [200, 300, 400]),
        ({"best": 1}, [200]),
        ({"best": 2}, [200, 400]),
        ({"best": 3}, [100, 200, 400]),
        ({"steps": [300, 100]}, [100, 300]),
    ],
)
def test_complete_checkpoints_oldest_first(run: Path, keys: dict[str, Any], steps: list[int]) -> None:
    assert [path.name for path in select(run, **keys)] == [f"step_{step:08d}" for step in steps]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"last": 5}, r"5 checkpoints complete .* it has 4 \(of steps 100, 200, 300, 400\).*checkpoint.keep_last"),
        ({"best": 4}, r"4 checkpoints with a val_nelbo .* it has 3 \(of steps 100, 200, 400\).*checkpoint.keep_best"),
        ({"steps": [100, 500]}, "no complete checkpoint of step 500; it has those of 100, 200, 300, 400"),
        ({"steps": [100, 100]}, "--steps 100,100: one is there twice"),
    ],
)
def test_fewer_than_asked_for_are_refused(run: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        select(run, **keys)


def test_a_folder_without_checkpoints_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the directory of a run"):
        select(tmp_path, last=1)

"""RUN/rollback.json: damage is told on all ranks in one line, and what a return leaves behind goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_md import run_files
from megatron_md.checkpoint.directory import Retention
from megatron_md.checkpoint.rollback import Rollback, finish
from tests.checkpoint.test_directory import steps_in, write_checkpoint
from tests.ranks import run_ranks

RETURN = {"step": 2, "number": 1, "jumps": [[16, 40]], "skipped_total": 3}


def write_return(run_dir: Path, content: str | bytes = "") -> Path:
    path = run_dir / run_files.ROLLBACK
    path.write_bytes(content if isinstance(content, bytes) else (content or json.dumps(RETURN)).encode())
    return path


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff", b'{"step": 1}', b'{"step": 2, "jumps": [[1]]}'])
def test_a_damaged_file_is_named_with_the_way_out(content: bytes, tmp_path: Path) -> None:
    path = write_return(tmp_path, content)
    with pytest.raises(ValueError, match="restore or remove it") as refusal:
        Rollback.read(tmp_path)
    assert (
        str(refusal.value).startswith(f"{path}: ")
        and "it is damaged" in str(refusal.value)
        and "\n" not in str(refusal.value)
    )


def test_only_what_does_not_know_of_the_return_goes(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        write_checkpoint(directory, step, Retention(9))
    write_return(tmp_path)
    (directory / "step_00000004" / "progress.json").write_text("{")  # for `verify` to name
    copy = directory / "step_00000003.bak"
    (directory / "step_00000001").rename(copy)
    rollback = Rollback.read(tmp_path)
    assert rollback == Rollback(2, 1, ((16, 40),), 3)
    rollback.discard_newer(tmp_path)
    assert steps_in(directory) == [2, 4] and copy.is_dir() and (directory / "latest").read_text() == "step_00000002"


def told(run_dir: Path) -> list[Rollback | str | None]:
    """What `finish` says on each rank: without the file, with it, with a damaged one, and when the run begins anew."""
    dist.init_process_group("gloo")
    said: list[Rollback | str | None] = []
    for number in range(4):
        if dist.get_rank() == 0 and number:
            write_return(run_dir, "{" if number == 2 else "")
        if dist.get_rank() == 0 and number == 3:
            (run_dir / "checkpoints" / "step_00000002").rename(run_dir / "elsewhere")
        try:
            said.append(finish(run_dir))
        except ValueError as error:
            said.append(str(error))
    dist.destroy_process_group()
    return said


@pytest.mark.distributed
def test_all_ranks_learn_the_same(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints", 2, Retention(9))
    first, second = run_ranks(told, 2, tmp_path)
    assert first == second
    assert first[:2] == [None, Rollback(2, 1, ((16, 40),), 3)] and "is damaged" in first[2] and first[3] is None
    assert not (tmp_path / run_files.ROLLBACK).exists()

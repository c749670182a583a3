"""RUN/checkpoints: what is complete, what is kept, and what a crash leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_md.checkpoint.directory import (
    FORMAT_VERSION,
    Retention,
    checkpoint_name,
    complete_checkpoints,
    find_checkpoint,
    latest_checkpoint,
    partial_path,
    prepare,
    publish,
    read_progress,
    read_record,
)


def write_checkpoint(directory: Path, step: int, retention: Retention, *, skipped: int = 0, **record: Any) -> Path:
    """A checkpoint without tensors, through the same steps as a real one; its last `skipped` updates were left out."""
    partial = prepare(directory, step)
    guard = {"skipped_in_row": skipped, "first_skipped_step": step - skipped}
    progress = {"step": step, "next_sample_index": 0, "tokens": 0, "total_tokens": 1, "guard": guard}
    (partial / "progress.json").write_text(json.dumps({"format": FORMAT_VERSION, "progress": progress, **record}))
    (partial / "manifest.json").write_text("{}")
    return publish(directory, step, retention)


def steps_in(directory: Path) -> list[int]:
    """Steps of the checkpoints that are there; a copy that a test has put beside them is none."""
    names = (path.name.removeprefix("step_") for path in sorted(directory.glob("step_*")))
    return [int(name) for name in names if name.isdecimal()]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(2), {60, 70}),
        (Retention(1, every=30), {30, 60, 70}),
        (Retention(1, best=2), {20, 40, 70}),
        (Retention(3, every=50, best=1), {40, 50, 60, 70}),
        (Retention(8), {10, 20, 30, 40, 50, 60, 70}),
        (Retention(99), {10, 20, 30, 40, 50, 60, 70}),
    ],
)
def test_what_retention_keeps(retention: Retention, kept: set[int]) -> None:
    measured = {10: 3.0, 20: 2.0, 30: None, 40: 1.0, 50: None, 60: 2.5, 70: 9.0}
    assert retention.kept(measured) == kept


def test_where_a_rollback_would_lead_is_kept(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for step, skipped in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 3)):
        write_checkpoint(directory, step, Retention(1), skipped=skipped)
    assert steps_in(directory) == [2, 5]
    write_checkpoint(directory, 6, Retention(1))
    assert steps_in(directory) == [6]


def test_publishing_prunes_and_points_latest_at_the_newest(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for step, nelbo in ((1, 5.0), (2, 1.0), (3, None), (4, 2.0), (5, 3.0)):
        write_checkpoint(directory, step, Retention(2, best=1), val_nelbo=nelbo)
    assert steps_in(directory) == [2, 4, 5]
    assert latest_checkpoint(tmp_path) == directory / checkpoint_name(5)
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
    # A run that has gone back and saves an earlier step again keeps that one, though two later ones are there.
    write_checkpoint(directory, 3, Retention(2))
    assert steps_in(directory) == [3, 4, 5] and latest_checkpoint(tmp_path) == directory / checkpoint_name(3)


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for note in ("first", "second"):
        path = write_checkpoint(directory, 7, Retention(2), note=note)
    assert steps_in(directory) == [7] and read_record(path)["note"] == "second"


def test_what_a_crash_leaves_is_never_taken_and_goes_with_the_next_save(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    good = write_checkpoint(directory, 1, Retention(2))
    unfinished = prepare(directory, 2)
    (unfinished / "progress.json").write_text("{}")
    half_removed = directory / ".removing_step_00000000"
    half_removed.mkdir()
    assert complete_checkpoints(tmp_path) == [good]
    prepare(directory, 3)
    assert not unfinished.exists() and not half_removed.exists() and partial_path(directory, 3).is_dir()


def test_the_one_before_is_taken_where_latest_names_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    one, two = (write_checkpoint(directory, step, Retention(2)) for step in (1, 2))
    (directory / "latest").write_text("step_00000009")
    assert complete_checkpoints(tmp_path) == [two, one]
    (directory / "latest").unlink()
    assert latest_checkpoint(tmp_path) == two and find_checkpoint(tmp_path) == two and find_checkpoint(one) == one


@pytest.mark.parametrize("name", ["step_00000009.bak", "step_9", "step_best", "step_000000009", "step_00000009 (copy)"])
def test_other_names_are_neither_taken_nor_removed(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    write_checkpoint(directory, 9, Retention(2)).rename(directory / name)
    assert latest_checkpoint(tmp_path) is None
    kept = [write_checkpoint(directory, step, Retention(1)) for step in (1, 2)][-1]
    (directory / "latest").write_text(name)
    assert complete_checkpoints(tmp_path) == [kept] and (directory / name).is_dir()
    assert find_checkpoint(directory / name) == directory / name


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"step_00000001\xff", b"../elsewhere"])
def test_a_damaged_latest_names_nothing(content: bytes, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    one, two = (write_checkpoint(directory, step, Retention(2)) for step in (1, 2))
    (directory / "latest").write_bytes(content)
    assert complete_checkpoints(tmp_path) == [two, one]


def test_steps_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    found = [write_checkpoint(directory, step, Retention(9)) for step in (99_999_999, 100_000_000)]
    (directory / "latest").unlink()
    assert complete_checkpoints(tmp_path) == found[::-1]


def test_an_incomplete_directory_is_never_taken(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="neither a run directory"):
        find_checkpoint(tmp_path)
    broken = tmp_path / "checkpoints" / checkpoint_name(5)
    broken.mkdir(parents=True)
    (broken / "progress.json").write_text("{}")
    (tmp_path / "checkpoints" / "latest").write_text(broken.name)
    with pytest.raises(ValueError, match="none of its 1 checkpoints is complete"):
        latest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        read_progress(broken)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, Retention(1), format=1)
    with pytest.raises(ValueError, match="format 1 is not 2"):
        read_progress(path)

"""Saving and loading: whole or not at all, in the background as at once, damaged ones refused, errors on all ranks."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_md.checkpoint.directory import checkpoint_name, complete_checkpoints, latest_checkpoint, read_progress
from megatron_md.checkpoint.storage import explained
from megatron_md.config import Config
from tests.checkpoint.legs import ONE, SHARDED, build_manager, leg, legs_config, progress_at, uninterrupted
from tests.ranks import RankError, run_ranks
from tests.small_run import small_run

CONFIG = legs_config(SHARDED, tied=True)


def save_steps(config: Config, run_dir: Path, steps: list[int], keys: dict[str, Any]) -> None:
    """Save a fresh model as if it stood at these steps."""
    with small_run(config) as run:
        manager = build_manager(run_dir, **keys)
        for step in steps:
            manager.save(run.chunks, run.optimizer, progress_at(step))


@pytest.mark.distributed
def test_a_checkpoint_is_named_by_latest_and_carries_what_it_was_given(tmp_path: Path) -> None:
    run_ranks(save_steps, 1, CONFIG, tmp_path, [1, 2, 3], {"texts": {"notes": notes_text}})
    directory = tmp_path / "checkpoints"
    assert sorted(path.name for path in directory.glob("*")) == ["latest", checkpoint_name(2), checkpoint_name(3)]
    newest = latest_checkpoint(tmp_path)
    assert newest == directory / checkpoint_name(3) and read_progress(newest) == progress_at(3)
    assert (newest / "config.yaml").read_text() == "seed: 1\n" and (newest / "notes").read_text() == "of this moment"
    listed = json.loads((newest / "manifest.json").read_text())["files"]
    assert {path.name for path in newest.iterdir()} == {*listed, "manifest.json"}


def notes_text() -> str:
    """What the file holds; a lambda could not be sent to another process."""
    return "of this moment"


@pytest.mark.distributed
def test_a_background_save_holds_the_moment_at_which_it_began(tmp_path: Path) -> None:
    config = legs_config(ONE, tied=True)
    start = run_ranks(leg, 1, config, tmp_path, 0, 3, True, True)[0]  # trains on while it is written
    end = run_ranks(leg, 1, config, tmp_path, 3, 6, False)[0]
    assert start + end == uninterrupted(1, json.dumps(ONE), True)


def slow_save(config: Config, run_dir: Path, slow_rank: int) -> tuple[bool, bool, float]:
    """A background save with one slow rank, asked for at once and later."""
    from megatron_md.checkpoint import writer

    with small_run(config) as run:
        manager = build_manager(run_dir)
        digest = writer.digest_files
        if torch.distributed.get_rank() == slow_rank:
            writer.digest_files = lambda *args: (time.sleep(1.0), digest(*args))[1]
        manager.begin(run.chunks, run.optimizer, progress_at(1))
        early = manager.finish_if_written()
        with pytest.raises(writer.SaveError, match="before the one before it was finished"):
            manager.begin(run.chunks, run.optimizer, progress_at(2))
        saved = manager.finish()
        return early is None, saved.path.is_dir(), saved.total_seconds


@pytest.mark.distributed
def test_no_rank_completes_a_save_before_all_have_written(tmp_path: Path) -> None:
    for early_is_none, is_there, total_seconds in run_ranks(slow_save, 2, CONFIG, tmp_path, 1):
        assert early_is_none and is_there and total_seconds > 1.0


def full_disk(config: Config, run_dir: Path, where: str, background: bool) -> str:
    """A second save that meets a full disk on rank 1, or on rank 0 where only that one writes."""
    from megatron_md.checkpoint import directory, writer

    def fail(*args: Any, **keys: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with small_run(config) as run:
        manager = build_manager(run_dir)
        manager.save(run.chunks, run.optimizer, progress_at(1))
        rank = torch.distributed.get_rank()
        if where == "data" and rank == 1:
            writer.filesystem_async._write_item = fail
        if where == "texts" and rank == 0:
            writer.write_synced = fail
        if where == "metadata" and rank == 0:
            writer.filesystem_async.FileSystemWriterAsync.finish = fail
        if where == "mkdir" and rank == 0:
            directory.Path.mkdir = fail
        if where == "rename" and rank == 0:
            directory.os.rename = fail
        try:
            manager.begin(run.chunks, run.optimizer, progress_at(2), in_background=background)
            manager.finish()
        except writer.SaveError as error:
            return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("where", "background"),
    [
        ("data", True),
        pytest.param("data", False, marks=pytest.mark.slow),
        pytest.param("texts", False, marks=pytest.mark.slow),
        pytest.param("texts", True, marks=pytest.mark.slow),
        pytest.param("metadata", False, marks=pytest.mark.slow),
        pytest.param("mkdir", False, marks=pytest.mark.slow),
        ("rename", False),
    ],
)
def test_a_full_disk_is_told_on_all_ranks_and_leaves_the_checkpoint_before(
    where: str, background: bool, tmp_path: Path
) -> None:
    messages = run_ranks(full_disk, 2, CONFIG, tmp_path, where, background)
    assert len(set(messages)) == 1
    assert f"rank {int(where == 'data')}: " in messages[0] and "No space left on device" in messages[0]
    directory = tmp_path / "checkpoints"
    assert complete_checkpoints(tmp_path) == [directory / checkpoint_name(1)]
    assert sorted(path.name for path in directory.iterdir()) == ["latest", checkpoint_name(1)]


def short_files(config: Config, run_dir: Path) -> str:
    """Save where the system takes no file above 20 kB, and say what came of it."""
    import resource

    from megatron_md.checkpoint.writer import SaveError

    with small_run(config) as run:
        manager = build_manager(run_dir)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(SaveError) as caught:
            manager.save(run.chunks, run.optimizer, progress_at(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return str(caught.value)


@pytest.mark.distributed
def test_a_file_that_the_system_cuts_short_is_told_in_words(tmp_path: Path) -> None:
    first, second = run_ranks(short_files, 2, CONFIG, tmp_path)
    assert first == second and "rank 1: OSError: [Errno 27] File too large" in first
    assert not any((tmp_path / "checkpoints").iterdir())
    # What torch makes of a disk that is full in the middle of a tensor.
    text = str(
        explained(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), tmp_path)
    )
    assert text.startswith(f"{tmp_path}: a file could not be written whole; the disk has ")
    other = RuntimeError("something else")
    assert explained(other, tmp_path) is other


def die_during_save(config: Config, run_dir: Path, point: str) -> None:
    """Kill -9 of the process at one point of its second save."""
    import os as kernel

    from megatron_md.checkpoint import directory, manager, writer

    def die(*args: Any, **keys: Any) -> None:
        kernel.kill(kernel.getpid(), 9)

    with small_run(config) as run:
        saving = build_manager(run_dir, keep_last=1)
        saving.save(run.chunks, run.optimizer, progress_at(1))
        module, name = {
            "planned": (writer.CheckpointWrite, "start"),
            "first file": (writer.filesystem_async, "_write_item"),
            "texts": (writer, "write_synced"),
            "unsealed": (writer, "seal"),
            "sealed": (manager.names, "publish"),
            "renamed": (directory, "replace_file"),
            "named": (directory, "_prune"),
            "set aside": (directory.shutil, "rmtree"),
        }[point]
        setattr(module, name, die)
        saving.save(run.chunks, run.optimizer, progress_at(2))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("point", "survivor"),
    [
        pytest.param("planned", 1, marks=pytest.mark.slow),
        ("first file", 1),
        pytest.param("texts", 1, marks=pytest.mark.slow),
        pytest.param("unsealed", 1, marks=pytest.mark.slow),
        pytest.param("sealed", 1, marks=pytest.mark.slow),
        ("renamed", 1),
        pytest.param("named", 2, marks=pytest.mark.slow),
        pytest.param("set aside", 2, marks=pytest.mark.slow),
    ],
)
def test_a_kill_during_a_save_leaves_one_that_can_be_resumed(point: str, survivor: int, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="died without a word"):
        run_ranks(die_during_save, 1, CONFIG, tmp_path, point)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / checkpoint_name(survivor)
    run_ranks(leg, 1, CONFIG, tmp_path, survivor, survivor + 1, True)
    assert [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


def damage(checkpoint: Path, kind: str) -> str:
    """Damage the largest file of a checkpoint; returns its name."""
    path = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[:-100])
    if kind == "flipped":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 4]) + content[5001:])
    if kind == "missing":
        path.unlink()
    return path.name


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind", ["flipped", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("truncated", "missing"))]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(kind: str, tmp_path: Path) -> None:
    run_ranks(save_steps, 2, CONFIG, tmp_path, [1, 2], {})
    directory = tmp_path / "checkpoints"
    name = damage(directory / checkpoint_name(2), kind)
    run_ranks(leg, 2, CONFIG, tmp_path, 1, 2, False)
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert event["event"] == "checkpoint_damaged" and event["path"] == checkpoint_name(2) and name in event["error"]
    damage(directory / checkpoint_name(1), kind)
    with pytest.raises(RankError, match=r"every checkpoint is damaged .*: restore one, or remove them to start anew"):
        run_ranks(leg, 2, CONFIG, tmp_path, 1, 2, False)


def save_as(config: Config, run_dir: Path, identity: dict[str, Any]) -> None:
    """Save with an identity."""
    with small_run(config) as run:
        build_manager(run_dir, identity=lambda rows: identity).save(run.chunks, run.optimizer, progress_at(1))


def load_as(config: Config, checkpoint: Path, identity: dict[str, Any], only_model: bool) -> None:
    """Load with an identity."""
    with small_run(config) as run:
        manager = build_manager(checkpoint, identity=lambda rows: identity)
        (manager.load_model_only if only_model else manager.load)(run.chunks, run.optimizer, checkpoint)


@pytest.mark.distributed
def test_what_belongs_to_another_run_is_refused_with_a_diff(tmp_path: Path) -> None:
    identity = {"seed": 1, "corpus": [{"corpus": "a"}], "model.layers": 4, "tokenizer": "t"}
    run_ranks(save_as, 1, CONFIG, tmp_path, identity)
    checkpoint = latest_checkpoint(tmp_path)
    other = {**identity, "seed": 2, "corpus": [{"corpus": "b"}]}
    with pytest.raises(RankError, match=r"seed: 1 there, 2 now.*put these keys back") as refusal:
        run_ranks(load_as, 1, CONFIG, checkpoint, other, False)
    assert "corpus: [{'corpus': 'a'}] there, [{'corpus': 'b'}] now" in str(refusal.value)
    run_ranks(load_as, 1, CONFIG, checkpoint, other, True)  # weights go into another run
    with pytest.raises(RankError, match="tokenizer: t there, u now"):
        run_ranks(load_as, 1, CONFIG, checkpoint, {**other, "tokenizer": "u"}, True)


@pytest.mark.distributed
def test_state_of_another_precision_is_refused_by_name(tmp_path: Path) -> None:
    run_ranks(save_steps, 1, CONFIG, tmp_path, [1], {})
    with pytest.raises(
        RankError, match=r"this run's is \['exp_avg', 'exp_avg_sq', 'fp32_param'\]: put train.precision"
    ):
        run_ranks(leg, 1, legs_config(SHARDED, tied=True, precision="bf16"), tmp_path, 1, 2, False)

"""Weights that an accepted update has ruined: never saved where they are not finite, never returned to twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_md.checkpoint.directory import complete_checkpoints, is_bad, read_progress
from megatron_md.checkpoint.rollback import Rollback
from megatron_md.config import Config
from megatron_md.json_file import as_record
from megatron_md.train.bad_numbers import GuardState
from megatron_md.train.progress import Progress
from tests.checkpoint.legs import SHARDED
from tests.checkpoint.test_directory import Retention, steps_in, write_checkpoint
from tests.ranks import RankError, run_ranks
from tests.small_run import variant
from tests.train.test_bad_numbers import (
    events,
    guarded,
    pretrain_with,
    pretrain_without_rows,
    rolling,
    same_tensors,
)
from tests.train.test_trainer import metrics, without_times, write_bigram_corpus

MATRIX = "decoder.layers.1.mlp.linear_fc1.weight"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"train": write_bigram_corpus(tmp_path_factory.mktemp("corpus"), 60, 0)}


def config_of(run_dir: Path, corpora: dict[str, str], keep_last: int = 2, **train: Any) -> Config:
    keys = {"steps": 10, "max_skipped": 3, **train}
    return guarded(run_dir, corpora, train=keys, checkpoint={"every_steps": 2, "keep_last": keep_last})


def poison(stepper: Any, how: str) -> None:
    """Ruin this rank's weights: `explode` keeps every number finite."""
    import math

    from megatron_md.checkpoint.state import named_parameters, optimizer_slices

    weights = dict(named_parameters(stepper.chunks))
    if how == "explode":
        for parameter in weights.values():
            parameter.detach().mul_(1e30)
    elif how == "weight":
        weights[MATRIX].detach()[3, 5] = math.nan
    else:
        # Of a matrix that no other rank holds, where this one has a part of it.
        first, *others = optimizer_slices(stepper.optimizer)
        chosen = next((piece for piece in others if piece.parameter is weights[MATRIX]), first)
        chosen.tensors[how][1] = math.inf


def pretrain_poisoned(config: Config, update: int, how: str, marker: Path, rank: int | None = None) -> dict[str, Any]:
    """Train with weights that are ruined once, after this update, on all ranks or one; a restart does not repeat it."""
    from megatron_md.train.step import Stepper

    original, numbers = Stepper._update, iter(range(1, 1000))

    def ruinous(self: Any, grad_norm: float) -> None:
        original(self, grad_norm)
        mark = marker.with_suffix(f".{self.world.rank}")
        if next(numbers) == update and not mark.exists():
            mark.touch()
            if rank in (None, self.world.rank):
                poison(self, how)

    Stepper._update = ruinous  # type: ignore[method-assign]
    return pretrain_with(config, {})


LAYOUTS = [
    pytest.param({}, "fp32", "weight", None, id="one process"),
    pytest.param({"tensor": 2}, "bf16", "fp32_param", 1, id="main parameter on one of TP 2", marks=pytest.mark.slow),
    pytest.param({**SHARDED, "overlap_param_gather": True, "overlap_grad_reduce": True}, "bf16", "fp32_param", 1,
                 id="DP 2, overlapped", marks=pytest.mark.slow),
    pytest.param({"pipeline": 2}, "fp32", "exp_avg_sq", 0, id="moment on one of PP 2", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("update", [4, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("layout", "precision", "how", "rank"), LAYOUTS)
def test_what_is_not_finite_is_never_saved_and_the_run_is_the_undisturbed_one(
    update: int,
    layout: dict[str, Any],
    precision: str,
    how: str,
    rank: int | None,
    tmp_path: Path,
    corpora: dict[str, str],
) -> None:
    size = 2 if layout else 1
    run, plain = (
        variant(config_of(tmp_path / name, corpora, precision=precision), parallel=layout) for name in ("run", "plain")
    )
    ruined = run_ranks(pretrain_poisoned, size, run, update, how, tmp_path / "marker", rank)
    undisturbed = run_ranks(pretrain_with, size, plain, {})
    for a, b in zip(ruined, undisturbed, strict=True):
        assert a["code"] == 0 and same_tensors(a, b) and a["jumps"] == ()
        assert dataclasses.replace(a["guard"], rollbacks=0) == b["guard"] and a["guard"].rollbacks == 1
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(tmp_path / "plain"))
    (refused,) = events(tmp_path / "run", "save_refused")
    assert refused["step"] == update and "not finite" in refused["error"] and f"on rank {rank or 0}" in refused["error"]
    (event,) = events(tmp_path / "run", "rolled back")
    assert (event["step"], event["left_step"], event["rows"]) == (update - 2, update, None)
    assert not events(tmp_path / "run", "checkpoint_bad") and steps_in(tmp_path / "run" / "checkpoints") == [8, 10]


@pytest.mark.slow
@pytest.mark.distributed
def test_steps_that_poisoned_weights_spoil_are_not_blamed_on_their_rows(
    tmp_path: Path, corpora: dict[str, str]
) -> None:
    # Steps 4 (with its save) is left out already when the save looks at the weights.
    (ruined,) = run_ranks(pretrain_poisoned, 1, config_of(tmp_path / "run", corpora), 3, "weight", tmp_path / "marker")
    (undisturbed,) = run_ranks(pretrain_with, 1, config_of(tmp_path / "plain", corpora), {})
    assert same_tensors(ruined, undisturbed) and ruined["jumps"] == () and ruined["guard"].skipped_total == 1


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("keys", "update", "said"),
    [
        ({"max_skipped": 0}, 4, "PoisonedError: .*on rank 0.* train.max_skipped is 0"),
        pytest.param({}, 2, "not finite after step 2 .*and no checkpoint from before", marks=pytest.mark.slow),
        pytest.param({"max_rollbacks": 0}, 4, "not finite after step 4 .*which is train.max", marks=pytest.mark.slow),
    ],
)
def test_where_no_return_is_possible_the_run_ends_and_says_so(
    keys: dict[str, Any], update: int, said: str, tmp_path: Path, corpora: dict[str, str]
) -> None:
    config = config_of(tmp_path / "run", corpora, **keys)
    with pytest.raises(RankError, match=said):
        run_ranks(pretrain_poisoned, 1, config, update, "weight", tmp_path / "marker")
    assert steps_in(tmp_path / "run" / "checkpoints") == ([2] if update == 4 else [])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{}, pytest.param({**SHARDED}, marks=pytest.mark.slow)])
def test_a_second_return_without_an_accepted_step_sets_the_checkpoint_aside(
    layout: dict[str, Any], tmp_path: Path, corpora: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    size = 2 if layout else 1
    run, plain = (variant(config_of(tmp_path / name, corpora), parallel=layout) for name in ("run", "plain"))
    ruined = run_ranks(pretrain_poisoned, size, run, 4, "explode", tmp_path / "marker")
    undisturbed = run_ranks(pretrain_with, size, plain, {})
    for a, b in zip(ruined, undisturbed, strict=True):
        assert a["code"] == 0 and same_tensors(a, b) and a["jumps"] == ()
        assert (a["guard"].rollbacks, a["guard"].skipped_total) == (2, 6)
    assert [r["loss"] for r in metrics(tmp_path / "run")] == [r["loss"] for r in metrics(tmp_path / "plain")]
    first, second = events(tmp_path / "run", "rolled back")
    assert (first["step"], first["rows"]) == (4, [32, 56]) and (second["step"], second["rows"]) == (2, None)
    (bad,) = events(tmp_path / "run", "checkpoint_bad")
    directory = tmp_path / "run" / "checkpoints"
    aside = directory / "step_00000004.bad"
    assert bad["path"] == aside.name and is_bad(aside) and read_progress(aside).step == 4
    assert steps_in(directory) == [8, 10]  # it is not counted among the two that are kept
    from megatron_md.cli import main

    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    told = {Path(c["path"]).name: c["state"] for c in json.loads(capsys.readouterr().out)["checkpoints"]}
    assert told == {aside.name: "bad", "step_00000008": "complete", "step_00000010": "complete"}
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "no update was accepted" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.distributed
def test_bad_rows_that_one_return_does_not_cover_are_left_out_in_the_end(
    tmp_path: Path, corpora: dict[str, str]
) -> None:
    bad = {g: float("nan") for g in range(32, 80)}  # six steps right behind a save; three lead to a return
    (returned,) = run_ranks(pretrain_with, 1, rolling(tmp_path / "run", corpora), bad)
    (plain,) = run_ranks(pretrain_without_rows, 1, rolling(tmp_path / "plain", corpora), ((32, 80),))
    assert same_tensors(returned, plain) and returned["jumps"] == ((32, 80),)
    assert [event["step"] for event in events(tmp_path / "run", "rolled back")] == [4, 2, 4]


def die_in_the_second_return(config: Config, marker: Path, moment: str) -> None:
    """`kill -9` while a checkpoint is set aside."""
    import os

    from megatron_md.checkpoint import rollback
    from megatron_md.checkpoint.manager import CheckpointManager

    if moment == "before the rename":
        rollback.set_aside_as_bad = lambda path: os._exit(9)
    elif moment == "after the rename":
        aside = rollback.set_aside_as_bad
        rollback.set_aside_as_bad = lambda path: (aside(path), os._exit(9))  # type: ignore[return-value]
    else:
        agreed = rollback.agreed

        def second(*args: Any, **keys: Any) -> Any:
            if args[1].guard.rollbacks == 1:
                if moment == "before it":
                    os._exit(9)
                CheckpointManager.load = lambda *args: os._exit(9)  # type: ignore[method-assign]
            return agreed(*args, **keys)

        rollback.agreed = second
    pretrain_poisoned(config, 4, "explode", marker)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("moment", ["before it", "before the rename", "after the rename", "before the load"])
def test_a_crash_while_a_checkpoint_is_set_aside_changes_nothing(
    moment: str, tmp_path: Path, corpora: dict[str, str]
) -> None:
    (whole,) = run_ranks(pretrain_poisoned, 1, config_of(tmp_path / "whole", corpora), 4, "explode", tmp_path / "first")
    config = config_of(tmp_path / "run", corpora)
    with pytest.raises(RankError, match="without a word"):
        run_ranks(die_in_the_second_return, 1, config, tmp_path / "marker", moment)
    (resumed,) = run_ranks(pretrain_with, 1, config, {})
    assert same_tensors(resumed, whole)
    assert (resumed["guard"], resumed["jumps"]) == (whole["guard"], whole["jumps"])
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(tmp_path / "whole"))
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").glob("*.bad*"))] == ["step_00000004.bad"]


def test_older_records_know_no_blame_and_new_ones_survive_json() -> None:
    older = {"recent_losses": [1.0], "skipped_total": 2, "rollbacks": 1}
    assert as_record(GuardState, older, "here", "") == GuardState(
        (1.0,), 2, rollbacks=1, is_proven=True, suspects=(0, 0)
    )
    guard = GuardState((1.0,), 2, rollbacks=1, is_proven=False, suspects=(8, 24))
    assert as_record(GuardState, json.loads(json.dumps(dataclasses.asdict(guard))), "here", "") == guard


def test_a_return_blames_rows_then_the_checkpoint_then_both_ranges_of_rows(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for step in (2, 4):
        write_checkpoint(directory, step, Retention(9))

    def due(guard: GuardState, step: int, row: int, jumps: tuple[tuple[int, int], ...], **keys: Any) -> Rollback:
        return Rollback.due(tmp_path, Progress(step, row, 0, 1, jumps, guard), max_rollbacks=9, **keys)

    old = ((8, 16),)
    first = due(GuardState((), 3, 3, 4, 32), 7, 56, old)
    assert (first.step, first.jumps, first.suspects, first.bad) == (4, (*old, (32, 56)), (32, 56), None)
    guard = first.applied(Progress(4, 32, 0, 1)).guard
    assert not guard.is_proven and guard.suspects == (32, 56)
    unproven = dataclasses.replace(guard, skipped_in_row=3, first_skipped_step=4, first_skipped_row=56)
    second = due(unproven, 7, 80, first.jumps)
    assert (second.step, second.jumps, second.suspects, second.bad) == (2, old, (32, 80), 4)
    assert "step_00000004" in second.reason
    again = dataclasses.replace(second.applied(Progress(2, 16, 0, 1)).guard, is_proven=True, skipped_in_row=3)
    again = dataclasses.replace(again, first_skipped_step=4, first_skipped_row=32)
    third = due(again, 7, 56, second.jumps)
    assert (third.step, third.jumps, third.bad) == (4, (*old, (32, 80)), None)
    poisoned = due(again, 7, 56, old, poisoned="weights are not finite")
    assert poisoned.jumps == old and poisoned.reason.startswith("weights are not finite")


def test_two_checkpoints_before_a_streak_are_kept_and_bad_ones_for_good(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for step, skipped in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 3)):
        write_checkpoint(directory, step, Retention(2), skipped=skipped)
    assert steps_in(directory) == [1, 2, 4, 5]
    Rollback(1, 2, (), 3, bad=2).discard_newer(tmp_path)
    Rollback(1, 2, (), 3, bad=2).discard_newer(tmp_path)
    assert steps_in(directory) == [1] and (directory / "latest").read_text() == "step_00000001"
    aside = directory / "step_00000002.bad"
    assert aside.is_dir() and complete_checkpoints(tmp_path) == [directory / "step_00000001"]
    for number in (2, 3):
        write_checkpoint(directory, 2, Retention(1))
        Rollback(1, number, (), 3, bad=2).discard_newer(tmp_path)
        write_checkpoint(directory, 1, Retention(1))
    assert sorted(path.name for path in directory.glob("*.bad*")) == [f"{aside.name}{n}" for n in ("", "2", "3")]

"""Bad numbers never reach the weights: skipped updates, returns to a checkpoint, and the same after a crash."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.config import Config, LRScheduleConfig
from megatron_md.json_file import as_record
from megatron_md.train.bad_numbers import FEWEST, WINDOW, GuardState, not_finite
from megatron_md.train.progress import Progress
from tests.ranks import RankError, run_ranks
from tests.small_run import CONFIG, LENGTH
from tests.train.test_trainer import config_for, metrics, without_times, write_bigram_corpus

ROWS = 8  # of a global batch


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"train": write_bigram_corpus(tmp_path_factory.mktemp("corpus"), 60, 0)}


def guarded(run_dir: Path, corpora: dict[str, str], **sections: dict[str, Any]) -> Config:
    return config_for(run_dir, corpora, **{"validation": {"sequences": 0}, **sections})


def accepted(losses: list[float]) -> GuardState:
    state = GuardState()
    for loss in losses:
        state = state.after(loss, skipped=False, step=0, first_row=0)
    return state


def test_what_is_not_finite_is_a_fault() -> None:
    assert not_finite(1.0, 2.0) is None
    for bad in (math.nan, math.inf, -math.inf):
        assert "loss" in str(not_finite(bad, 1.0)) and "gradient norm" in str(not_finite(1.0, bad))
        assert GuardState().fault(bad, 1.0, None) and GuardState().fault(1.0, bad, 5.0)


def test_a_spike_is_measured_against_the_running_median() -> None:
    losses = [1.0, 2.0, 3.0] * FEWEST
    state = accepted(losses)
    assert state.fault(6.0, 1.0, 3.0) is None and "running median 2" in str(state.fault(6.001, 1.0, 3.0))
    assert state.fault(1e9, 1.0, None) is None and state.fault(1e9, 1.0, 0.0) is None
    # One accepted outlier does not move a median; too few losses say nothing.
    assert state.after(1e6, skipped=False, step=0, first_row=0).fault(6.001, 1.0, 3.0)
    assert accepted([1.0] * (FEWEST - 1)).fault(100.0, 1.0, 3.0) is None
    assert accepted([1.0] * FEWEST).fault(100.0, 1.0, 3.0)
    assert accepted([float(n) for n in range(500)]).recent_losses == tuple(float(n) for n in range(500 - WINDOW, 500))


def test_a_streak_remembers_its_beginning_and_ends_with_an_accepted_step() -> None:
    state = accepted([1.0])
    for step in (5, 6, 7):
        state = state.after(math.nan, skipped=True, step=step, first_row=8 * step)
    assert (state.skipped_total, state.skipped_in_row) == (3, 3)
    assert (state.first_skipped_step, state.first_skipped_row) == (5, 40)
    state = state.after(2.0, skipped=False, step=8, first_row=64)
    assert (state.skipped_total, state.skipped_in_row, state.recent_losses) == (3, 0, (1.0, 2.0))
    state = state.after(math.nan, skipped=True, step=9, first_row=72)
    assert (state.skipped_total, state.first_skipped_step, state.first_skipped_row) == (4, 9, 72)


def test_progress_goes_through_json_to_the_bit() -> None:
    losses = tuple(float(x) for x in np.random.default_rng(0).lognormal(size=50))
    guard = GuardState(losses, 7, 2, 5, 40, 1)
    progress = Progress(3, 24, 768, 9999, jumps=((8, 16), (40, 80)), guard=guard)
    assert as_record(Progress, json.loads(json.dumps(dataclasses.asdict(progress))), "here", "") == progress
    older = {"step": 3, "next_sample_index": 24, "tokens": 768, "total_tokens": 9999}
    assert as_record(Progress, older, "here", "") == Progress(3, 24, 768, 9999)
    with pytest.raises(ValueError, match="unknown"):
        as_record(Progress, {**older, "unknown": 1}, "here", "")


def test_jumps_leave_out_rows_and_nothing_else() -> None:
    progress = Progress.start(CONFIG).with_jumps(((16, 32), (32, 40), (56, 64)))
    first_rows = []
    for _ in range(5):
        first_rows.append(progress.batch_position(CONFIG).first_sample_index)
        progress = progress.after(CONFIG)
    assert first_rows == [0, 8, 40, 48, 64]
    assert (progress.step, progress.tokens) == (5, 5 * ROWS * LENGTH)
    assert Progress.start(CONFIG).with_jumps(((0, 24),)).next_sample_index == 24


def pretrain_with(config: Config, factors: dict[int, float], leave_out: tuple[int, ...] = ()) -> dict[str, Any]:
    """Train where the weights of the loss at row g are multiplied by `factors[g]`.

    Returns this rank's final weights and Adam moments; without the update of each step in `leave_out`.
    """
    import torch

    from megatron_md.run.pretrain import pretrain
    from megatron_md.train.step import Stepper
    from megatron_md.train.trainer import Trainer

    corrupt, update = Stepper.corrupt, Stepper._update
    final: dict[str, Any] = {}
    trainer_fit = Trainer.fit
    steps = iter(range(1, 1000))

    def planted(self: Any, batches: Any) -> Any:
        return [
            dataclasses.replace(masked, weights_M=masked.weights_M * np.float32(factors[hit[0]])) if hit else masked
            for masked, hit in (
                (masked, [int(g) for g in batch.sample_index_B if int(g) in factors])
                for batch, masked in zip(batches, corrupt(self, batches), strict=True)
            )
        ]

    def counted(self: Any, grad_norm: float) -> None:
        if next(steps) not in leave_out:
            update(self, grad_norm)

    def fit(self: Any) -> None:
        trainer_fit(self)
        parameters = [p for chunk in self.stepper.chunks for p in chunk.parameters()]
        moments = [
            value
            for part in self.optimizer.chained_optimizers
            for state in part.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        final["tensors"] = [tensor.detach().float().numpy().copy() for tensor in [*parameters, *moments]]
        final["guard"] = self.progress.guard
        final["jumps"] = self.progress.jumps

    Stepper.corrupt, Stepper._update, Trainer.fit = planted, counted, fit  # type: ignore[method-assign]
    final["code"] = pretrain(config)
    return final


def same_tensors(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a["tensors"], b["tensors"], strict=True))


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout", [{"distributed_optimizer": True}, pytest.param({"tensor": 2}, marks=pytest.mark.slow), {"pipeline": 2}]
)
def test_a_planted_nan_equals_an_update_left_out(
    layout: dict[str, Any], tmp_path: Path, corpora: dict[str, str]
) -> None:
    nan = guarded(tmp_path / "nan", corpora, parallel=layout, train={"steps": 5})
    out = guarded(tmp_path / "out", corpora, parallel=layout, train={"steps": 5})
    # Row 21 is in the third batch.
    skipped = run_ranks(pretrain_with, 2, nan, {21: math.nan})
    left_out = run_ranks(pretrain_with, 2, out, {}, (3,))
    for a, b in zip(skipped, left_out, strict=True):
        assert same_tensors(a, b)
        assert all(np.isfinite(tensor).all() for tensor in a["tensors"])
        assert a["guard"].skipped_total == 1
    records = metrics(tmp_path / "nan")
    assert [record["skipped"] for record in records] == [0, 0, 1, 0, 0]
    assert [record["skipped_total"] for record in records] == [0, 0, 1, 1, 1]
    (event,) = events(tmp_path / "nan", "skipped")
    assert event["step"] == 3 and event["rows"] == [16, 24] and "not finite" in event["reason"]
    assert event["loss"] is None
    assert "rows 16 to 24" in (tmp_path / "nan" / "logs" / "rank_0.log").read_text()


@pytest.mark.distributed
@pytest.mark.slow
def test_a_planted_spike_is_skipped_and_a_resumed_run_judges_alike(tmp_path: Path, corpora: dict[str, str]) -> None:
    steps = FEWEST + 4
    spiked = {ROWS * (FEWEST + 1): 40.0}
    constant = {"lr_schedule": LRScheduleConfig(name="constant")}
    keys: dict[str, Any] = {"train": {"steps": steps, "spike_factor": 2.0}, "optimizer": constant}
    (whole,) = run_ranks(pretrain_with, 1, guarded(tmp_path / "whole", corpora, **keys), spiked)
    (event,) = events(tmp_path / "whole", "skipped")
    assert event["step"] == FEWEST + 2 and "2 x the running median" in event["reason"]
    # The median's losses come from the checkpoint: a resumed run that had forgotten them would take the spike.
    first = guarded(tmp_path / "parts", corpora, **{**keys, "train": {**keys["train"], "steps": FEWEST}})
    run_ranks(pretrain_with, 1, first, spiked)
    (resumed,) = run_ranks(pretrain_with, 1, guarded(tmp_path / "parts", corpora, **keys), spiked)
    assert resumed["guard"] == whole["guard"] and resumed["guard"].skipped_total == 1
    assert len(events(tmp_path / "parts", "skipped")) == 1


BAD = {g: math.nan for g in range(40, 64)}  # steps 6, 7 and 8 of an undisturbed run


def rolling(run_dir: Path, corpora: dict[str, str], **train: Any) -> Config:
    keys = {"steps": 12, "max_skipped": 3, **train}
    return guarded(run_dir, corpora, train=keys, checkpoint={"every_steps": 2, "keep_last": 4})


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout", [{"distributed_optimizer": True}, pytest.param({"tensor": 2}, marks=pytest.mark.slow)]
)
def test_after_several_bad_steps_the_run_returns_and_leaves_the_rows_out(
    layout: dict[str, Any], tmp_path: Path, corpora: dict[str, str]
) -> None:
    config = dataclasses.replace(
        rolling(tmp_path / "run", corpora), parallel=dataclasses.replace(CONFIG.parallel, **layout)
    )
    for rank in run_ranks(pretrain_with, 2, config, BAD):
        assert rank["code"] == 0 and rank["jumps"] == ((40, 64),)
        assert (rank["guard"].rollbacks, rank["guard"].skipped_total, rank["guard"].skipped_in_row) == (1, 3, 0)
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert all(record["loss"] is not None and record["skipped"] == 0 for record in records)
    (event,) = events(tmp_path / "run", "rolled back")
    assert (event["step"], event["left_step"], event["rows"]) == (4, 8, [40, 64])


@pytest.mark.distributed
def test_the_run_after_a_rollback_is_the_run_without_those_rows(tmp_path: Path, corpora: dict[str, str]) -> None:
    (returned,) = run_ranks(pretrain_with, 1, rolling(tmp_path / "run", corpora), BAD)
    (plain,) = run_ranks(pretrain_without_rows, 1, rolling(tmp_path / "plain", corpora), ((40, 64),))
    assert same_tensors(returned, plain)
    assert [r["loss"] for r in metrics(tmp_path / "run")] == [r["loss"] for r in metrics(tmp_path / "plain")]


def pretrain_without_rows(config: Config, jumps: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    start = Progress.start
    Progress.start = classmethod(lambda cls, *args: start(*args).with_jumps(jumps))  # type: ignore[method-assign, assignment]
    return pretrain_with(config, {})


def die_at_rollback(config: Config, factors: dict[int, float], moment: str) -> None:
    """`kill -9` at a moment of the return to a checkpoint."""
    import os

    from megatron_md.checkpoint import rollback
    from megatron_md.checkpoint.manager import CheckpointManager

    if moment == "before it":
        rollback.agreed = lambda *args, **keys: os._exit(9)
    elif moment == "before the checkpoints go":
        rollback.Rollback.discard_newer = lambda *args: os._exit(9)  # type: ignore[method-assign, assignment]
    else:
        CheckpointManager.load = lambda *args: os._exit(9)  # type: ignore[method-assign]
    pretrain_with(config, factors)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "moment",
    [
        "before it",
        pytest.param("before the checkpoints go", marks=pytest.mark.slow),
        pytest.param("before the load", marks=pytest.mark.slow),
    ],
)
def test_a_crash_within_the_rollback_changes_nothing(moment: str, tmp_path: Path, corpora: dict[str, str]) -> None:
    (whole,) = run_ranks(pretrain_with, 1, rolling(tmp_path / "whole", corpora), BAD)
    config = rolling(tmp_path / "run", corpora)
    with pytest.raises(RankError, match="without a word"):
        run_ranks(die_at_rollback, 1, config, BAD, moment)
    (resumed,) = run_ranks(pretrain_with, 1, config, BAD)
    assert same_tensors(resumed, whole)
    assert (resumed["guard"], resumed["jumps"]) == (whole["guard"], whole["jumps"])
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(tmp_path / "whole"))


@pytest.mark.distributed
def test_where_it_repeats_the_run_fails_with_a_report(tmp_path: Path, corpora: dict[str, str]) -> None:
    always = {g: math.nan for g in range(40, 10_000)}
    config = rolling(tmp_path / "run", corpora, max_rollbacks=2)
    with pytest.raises(RankError, match=r"bad numbers in 3 steps in a row, from step 6 to 8 .*after 2 rollback\(s\)"):
        run_ranks(pretrain_with, 2, config, always)
    assert len(events(tmp_path / "run", "rolled back")) == 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "train.max_rollbacks" in summary["error"]


@pytest.mark.distributed
def test_without_a_checkpoint_from_before_the_run_fails_and_says_so(tmp_path: Path, corpora: dict[str, str]) -> None:
    early = {g: math.nan for g in range(8, 40)}
    with pytest.raises(RankError, match="no checkpoint from before them"):
        run_ranks(pretrain_with, 1, rolling(tmp_path / "run", corpora), early)


@pytest.mark.distributed
def test_a_validation_that_is_not_a_number_does_not_end_the_run(tmp_path: Path) -> None:
    corpora = {name: write_bigram_corpus(tmp_path / name, 20, seed) for seed, name in enumerate(("train", "valid"))}
    config = config_for(tmp_path / "run", corpora, train={"steps": 3}, validation={"every_steps": 1, "sequences": 8})
    assert run_ranks(pretrain_with_bad_validation, 1, config) == [0]
    records = metrics(tmp_path / "run")
    assert [record["val_nelbo"] for record in records] == [None, None, None]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def pretrain_with_bad_validation(config: Config) -> int:
    from megatron_md.run.pretrain import pretrain
    from megatron_md.train.inference import Inference

    original = Inference.negative_log_likelihoods
    Inference.negative_log_likelihoods = lambda self, batches: [  # type: ignore[method-assign]
        nll_M * np.float32("nan") for nll_M in original(self, batches) or []
    ]
    return pretrain(config)

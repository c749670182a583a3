"""Device-hours and FLOPs from what a run's files tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_md.report.cost import device_hours, training_flops
from megatron_md.report.recorded import read_run
from megatron_md.run.estimate import padded_vocab, training_flops_per_token
from tests.report.recorded_run import EVENTS, lines, write_recorded_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_recorded_run(tmp_path / "run")


def test_device_hours_are_those_of_each_start_times_its_processes(run: Path) -> None:
    assert device_hours(read_run(run)) == pytest.approx(90 * 4 / 3600)
    again = [{"time": 20_000.0, "event": "started", "world_size": 2}, {"time": 20_030.0, "event": "finished"}]
    (run / "events.jsonl").write_text(lines([*EVENTS, *again]))
    assert device_hours(read_run(run)) == pytest.approx((90 * 4 + 30 * 2) / 3600)


def test_a_killed_run_lasted_until_its_last_sign_of_life(run: Path) -> None:
    (run / "events.jsonl").write_text(lines(EVENTS[:1]))
    assert device_hours(read_run(run)) == pytest.approx(80 * 4 / 3600)


def test_without_events_the_logged_steps_tell(run: Path) -> None:
    (run / "events.jsonl").unlink()
    assert device_hours(read_run(run)) == pytest.approx(70 * 4 / 3600)
    (run / "metrics.jsonl").unlink()
    assert device_hours(read_run(run)) is None


def test_flops_are_those_of_the_dry_run(run: Path) -> None:
    found = read_run(run)
    assert found.config is not None
    expected = 8000 * training_flops_per_token(found.config, padded_vocab(found.config), recomputation=True)
    assert training_flops(found) == pytest.approx(expected)


def test_a_schedule_of_a_module_that_is_not_imported_leaves_flops_open(tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / "run", objective={"mask_schedule": "theirs:1"})
    assert training_flops(read_run(run)) is None

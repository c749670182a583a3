"""What is written about a run: cut back on resume, never half written."""

from __future__ import annotations

import errno
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_md.train.callbacks import metrics
from megatron_md.train.callbacks.metrics import Console, MetricsWriter, append_event, truncate_metrics, write_json
from tests.small_run import variant
from tests.train.damaged_lines import DAMAGED


def test_metrics_are_cut_back_to_the_resumed_step_and_a_torn_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0 / step}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 2, "lo')
    truncate_metrics(path, 2)
    assert path.read_text().splitlines() == lines[:2]
    truncate_metrics(path, 0)
    assert path.read_text() == ""
    truncate_metrics(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def numbered(*steps: int) -> list[bytes]:
    return [json.dumps({"step": step, "tokens": 8 * step, "loss": 1.0 / step}).encode() + b"\n" for step in steps]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_line_is_kept_aside_and_costs_no_other(
    damaged: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.damaged"
    aside.write_bytes(b"from before\n")
    path.write_bytes(b"".join([*numbered(1, 2), damaged + b"\n", b"\n", *numbered(3, 4, 5), damaged]))
    truncate_metrics(path, 4)
    assert path.read_bytes() == b"".join(numbered(1, 2, 3, 4))
    assert aside.read_bytes() == b"from before\n" + 2 * (damaged + b"\n")
    told = f"megatron-md: {path}: lines 3, 8 are damaged and moved to metrics.jsonl.damaged\n"
    assert capsys.readouterr().err == told
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["file"], event["lines"]) for event in events] == [
        ("lines_damaged", "metrics.jsonl", [3, 8])
    ]
    truncate_metrics(path, 4)
    assert capsys.readouterr().err == "" and aside.read_bytes().count(damaged) == 2


def test_a_crash_between_the_two_files_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, aside = tmp_path / "samples.jsonl", tmp_path / "samples.jsonl.damaged"
    before = b"".join([*numbered(1), b"15\n", *numbered(2)])
    path.write_bytes(before)
    aside.write_bytes(b"5\n")
    replace_file = metrics.replace_file

    def crashing(target: Path, content: bytes) -> None:
        if target == path:
            raise KeyboardInterrupt
        replace_file(target, content)

    for _ in range(2):
        monkeypatch.setattr(metrics, "replace_file", crashing)
        with pytest.raises(KeyboardInterrupt):
            truncate_metrics(path, 2)
        assert path.read_bytes() == before and aside.read_bytes() == b"5\n15\n"
    monkeypatch.setattr(metrics, "replace_file", replace_file)
    truncate_metrics(path, 2)
    assert path.read_bytes() == b"".join(numbered(1, 2)) and aside.read_bytes() == b"5\n15\n"


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_events_are_appended_with_their_time(tmp_path: Path) -> None:
    append_event(tmp_path, "started", step=0)
    append_event(tmp_path, "saved", step=5, path="x")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "saved"] and events[1]["path"] == "x"
    assert events[0]["time"] <= events[1]["time"]


@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_lines_that_a_full_disk_does_not_take_follow_later(
    on_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append, is_full = metrics.append, [False]

    def limited(*args: Any) -> None:
        if is_full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(*args)

    monkeypatch.setattr(metrics, "append", limited)
    writer = MetricsWriter(variant(checkpoint={"on_error": on_error}), tmp_path, flops_per_token=1.0, peak_flops=None)
    for step in range(1, 6):
        is_full[0] = step in (2, 3)
        append_event(tmp_path, "passed", step=step)
        if is_full[0] and on_error == "stop":
            with pytest.raises(OSError, match="No space left"):
                writer._write({"step": step})
            return
        writer._write({"step": step})
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    told = capsys.readouterr().err
    assert told.count("metrics.jsonl cannot be written (No space left on device); its lines are kept") == 1
    # An event is not kept, but told with all that it holds.
    assert told.count("events.jsonl cannot be written") == 2 and '"event": "passed", "step": 3' in told


def test_console_prints_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "step": 7,
        "loss": 1.25,
        "masked_ce": 2.5,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens_per_second": 1234.6,
        "skipped": 2,
        "val_nelbo": 3.5,
        "val_nelbo_stderr": 0.25,
        "mfu": 0.4,
    }
    console = Console(10, 0)
    console.line(record)
    console.advance(8)
    console.close()
    line = capsys.readouterr().err
    for part in ("step      7", "loss 1.2500", "1,235 tok/s", "mfu 40.0%", "SKIPPED 2", "val_nelbo 3.5000 ± 0.2500"):
        assert part in line


def test_validations_are_a_curve_at_the_ends_of_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    record = dict.fromkeys(("step", "loss", "grad_norm", "lr", "tokens_per_second", "skipped", "val_nelbo_stderr"), 0)
    console = Console(10, 0)
    for nelbo in (9.0, math.nan, 5.5, 2.0):
        console.line(record | {"val_nelbo": nelbo})
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == ["▁", "▁?", "█?▁", "█?▅▁"]


def step_of(writer: MetricsWriter, trainer: Any, **figures: float) -> dict[str, Any]:
    """A step of 64 tokens by the writer's clock; what it has put into the record."""
    trainer.progress.step += 1
    trainer.progress.tokens += 64
    record = {"step": trainer.progress.step, "step_seconds": 0.5, "data_seconds": 0.125, "skipped": 0, **figures}
    record |= {"loss": 2.0, "grad_norm": 1.0, "lr": 1e-3}
    writer.after_step(trainer, SimpleNamespace(record=record, fault=None, rows=(0, 0)))
    return record


def trainer_at(step: int, *, size: int = 1) -> Any:
    world = SimpleNamespace(is_main=True, size=size, device=torch.device("cpu"))
    return SimpleNamespace(progress=SimpleNamespace(step=step, tokens=64 * step), world=world)


def test_speed_and_mfu_are_those_of_the_steps_since_the_last_line(tmp_path: Path) -> None:
    config = variant(log={"every_steps": 2, "tensorboard": False}, train={"steps": 9})
    writer = MetricsWriter(config, tmp_path, flops_per_token=1e6, peak_flops=4e6)
    trainer = trainer_at(4, size=8)
    writer.on_start(trainer)
    assert "mfu" not in step_of(writer, trainer)
    # 128 tokens in 1 s are 128e6 FLOP/s, 16e6 for each of 8 devices.
    record = step_of(writer, trainer)
    assert record["tokens_per_second"] == 128.0 and record["mfu"] == 4.0 and record["data_seconds"] == 0.25
    step_of(writer, trainer)
    assert step_of(writer, trainer, step_seconds=1.5)["mfu"] == 2.0
    assert writer.tokens_per_second == 256 / 3.0
    writer.on_end(trainer)
    assert [json.loads(line)["mfu"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [4.0, 2.0]


def test_no_mfu_where_the_peak_is_not_known(tmp_path: Path) -> None:
    writer = MetricsWriter(variant(log={"every_steps": 1}), tmp_path, flops_per_token=1e6, peak_flops=None)
    assert "mfu" not in step_of(writer, trainer_at(0))


class StandIn(ModuleType):
    """In place of wandb or trackio: remembers what it is told.

    Attributes:
        started: arguments of each `init`.
        logged: scalars and step of each `log`.
        ended: how many runs have been finished.
    """

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(name)
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.ended = 0
        monkeypatch.setitem(sys.modules, name, self)

    def init(self, **keys: Any) -> StandIn:
        self.started.append(keys)
        return self

    def log(self, scalars: dict[str, Any], step: int) -> None:
        self.logged.append((scalars, step))

    def finish(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_one_run_per_directory_with_every_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = StandIn(name, monkeypatch)
    log = {"every_steps": 1, "tensorboard": False, f"{name}_project": "denoisers"}
    directories = [tmp_path / "run", tmp_path / "run", tmp_path / "other" / "run"]
    for directory, first in zip(directories, (0, 1, 0), strict=True):
        directory.mkdir(exist_ok=True, parents=True)
        writer = MetricsWriter(variant(log=log, train={"steps": 9}), directory, flops_per_token=1.0, peak_flops=None)
        trainer = trainer_at(first)
        writer.on_start(trainer)
        step_of(writer, trainer)
        writer.on_end(trainer)
    assert [keys["project"] for keys in package.started] == ["denoisers"] * 3
    assert {keys["resume"] for keys in package.started} == {"allow"}
    # A restarted run goes on, and another directory of the same name is another run.
    identities = [keys["id" if name == "wandb" else "name"] for keys in package.started]
    assert identities[0] == identities[1] != identities[2]
    assert all(keys["name"].startswith("run") for keys in package.started)
    if name == "wandb":
        assert [keys["dir"] for keys in package.started] == [str(directory) for directory in directories]
    assert [step for _, step in package.logged] == [1, 2, 1] and package.ended == 3
    assert all(scalars["loss"] == 2.0 and not {"step", "time"} & scalars.keys() for scalars, _ in package.logged)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_loaded_only_when_asked_and_told_where_it_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert not list(variant().log.problems())
    assert list(variant(log={f"{name}_project": "denoisers"}).log.problems()) == [
        f"log.{name}_project is set, but {name} is not installed: pip install {name}, or leave the key out"
    ]
    package = StandIn(name, monkeypatch)
    writer = MetricsWriter(variant(log={"tensorboard": False}), tmp_path, flops_per_token=1.0, peak_flops=None)
    writer.on_start(trainer_at(0))
    writer.on_end(trainer_at(0))
    assert not package.started

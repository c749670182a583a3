"""Files of runs that somebody else has written, edited or damaged: one clear line or correct data, for every reader."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import strategies as st

from megatron_md.checkpoint.contract import config_changes
from megatron_md.checkpoint.directory import read_progress, read_record
from megatron_md.checkpoint.integrity import seal, verify
from megatron_md.checkpoint.rollback import Rollback
from megatron_md.cli import main
from megatron_md.commands import train
from megatron_md.commands.inspect import show
from megatron_md.config import Config, ModelConfig, config_from_mapping, load_config, to_yaml
from megatron_md.config import loader as config_loader
from megatron_md.config.schema import describe_type, keys_of
from megatron_md.data.ledger import QuarantineLedger
from megatron_md.data.resume import PROGRESS_NAME, BuildState, load_state
from megatron_md.diffusion.schedule import parse_schedule
from megatron_md.evaluate.likelihood import _read_state
from megatron_md.evaluate.prompts import read_prompts
from megatron_md.parity.config import load_parity_config
from megatron_md.parity.validate import default_reference, read_reference
from megatron_md.run.inspection import inspect
from tests.hostile import Case, changed_bytes, changed_json, changed_yaml, fuzz, profiles, refused, tried

PROGRESS = {"step": 3, "next_sample_index": 24, "tokens": 96, "total_tokens": 960, "jumps": [[8, 16]],
            "guard": {"recent_losses": [2.5, 2.25], "skipped_total": 1, "skipped_in_row": 0, "first_skipped_step": 1,
                      "first_skipped_row": 8, "rollbacks": 1}}  # fmt: skip
RECORD = {"format": 2, "progress": PROGRESS, "layout": {"tensor": 2, "data": 1}, "optimizer": ["exp_avg"],
          "identity": {"seed": 1}, "val_nelbo": 2.5}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with one checkpoint, as far as JSON and YAML go."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text(json.dumps(RECORD))
    (checkpoint / "config.yaml").write_text("train: {steps: 4}\n")
    seal(checkpoint)
    (run / "checkpoints" / "latest").write_text(checkpoint.name)
    (run / "config.yaml").write_text("train: {steps: 5}\n")
    (run / "summary.json").write_text('{"status": "stopped", "step": 3, "stopped_by": "SIGTERM"}')
    (run / "env.json").write_text('{"versions": {"torch": "2.9", "apex": null}, "gpus": []}')
    (run / "events.jsonl").write_text('{"time": 1.0, "event": "saved", "step": 3}\n{"time": 2.0, "event": "stop"}\n')
    (run / "rollback.json").write_text('{"step": 3, "number": 1, "jumps": [[8, 16]], "skipped_total": 1}')
    return run


def shown(run: Path) -> None:
    """What `inspect` makes of a run, as text and as JSON."""
    found = inspect(run)
    with redirect_stdout(io.StringIO()) as text:
        show(found, verified=False, against=None)
    json.dumps(asdict(found), allow_nan=False)
    assert str(run) in text.getvalue()


def checkpoint_record(run_dir: Path) -> Case:
    checkpoint = run_dir / "checkpoints" / "step_00000003"

    def read() -> None:
        shown(run_dir)
        read_record(checkpoint)
        progress = read_progress(checkpoint)
        assert progress.total_tokens > 0 and progress.with_jumps(progress.jumps).next_sample_index >= 0

    return changed_json(RECORD), checkpoint / "progress.json", read


def seal_of_a_checkpoint(run_dir: Path) -> Case:
    checkpoint = run_dir / "checkpoints" / "step_00000003"
    sound = (checkpoint / "manifest.json").read_bytes()

    def read() -> None:
        shown(run_dir)
        verify(checkpoint)
        assert (checkpoint / "manifest.json").read_bytes() == sound, "another manifest was taken"

    return changed_json(json.loads(sound)).filter(lambda data: data != sound), checkpoint / "manifest.json", read


def rollback_file(run_dir: Path) -> Case:
    path = run_dir / "rollback.json"
    return changed_json(json.loads(path.read_text())), path, lambda: Rollback.read(run_dir)


def one_of_a_run(name: str) -> Callable[[Path], Case]:
    def case(run_dir: Path) -> Case:
        path = run_dir / name
        sound = [json.loads(line) for line in path.read_text().splitlines()]
        files = changed_json(sound[-1]).map(lambda data: data + b"\n")
        return st.one_of(files, changed_bytes(path.read_bytes())), path, lambda: shown(run_dir)

    return case


def config_of_a_run(run_dir: Path) -> Case:
    checkpoint = run_dir / "checkpoints" / "step_00000003"

    def read() -> None:
        shown(run_dir)
        config_changes(checkpoint, to_yaml(Config()))
        config = load_config(checkpoint / "config.yaml")
        assert config_from_mapping(config_loader.parse_yaml(to_yaml(config), "config")) == config

    return changed_yaml(to_yaml(Config(model=ModelConfig(vocab=9)))), checkpoint / "config.yaml", read


def parity_config(run_dir: Path) -> Case:
    sound = "run_dir: x\ntask: {n: 4, k: 2}\nsweep:\n  seeds: [1, 2]\n  grid:\n    train.steps: [1, 2]\nseed: 5\n"
    path = run_dir / "parity.yaml"
    return changed_yaml(sound), path, lambda: load_parity_config(path)


def parity_record(run_dir: Path) -> Case:
    path = run_dir / "record.json"
    return changed_json(json.loads(default_reference().read_text())), path, lambda: read_reference(path)


def points_of_a_schedule(run_dir: Path) -> Case:
    path = run_dir / "points"

    def read() -> None:
        schedule = parse_schedule(f"knots:{path}")
        assert 0.0 <= schedule.mean() <= 1.0

    points = [[0.1, 1.0], [0.5, 2.0], [1.0, 0.5]]
    lines = "".join(f"{t} {density}  # point\n" for t, density in points).encode()
    return st.one_of(changed_json(points), changed_bytes(lines)), path, read


def quarantine_ledger(run_dir: Path) -> Case:
    path = run_dir / "quarantine.jsonl"
    entry = {"step": 4, "corpus": "c" * 8, "shard": "shard-000000.tar", "document": 7, "tokens": 12}

    def read() -> None:
        for damaged in QuarantineLedger.read(path):
            assert type(damaged.document) is int and type(damaged.shard) is str

    return changed_json(entry).map(lambda data: json.dumps(entry).encode() + b"\n" + data + b"\n"), path, read


def state_of_an_evaluation(run_dir: Path) -> Case:
    path = run_dir / "state.json"
    sound = {"rows": "ab", "estimator": {"name": "x", "density": [0.5]}, "passes": [[[1.0, None], [2.0, 3.0]]]}
    return changed_json(sound), path, lambda: _read_state(path)


def prompts_file(run_dir: Path) -> Case:
    path = run_dir / "prompts.jsonl"
    return changed_json({"prompt": "x"}), path, lambda: read_prompts(path)


def state_of_a_build(run_dir: Path) -> Case:
    folder = run_dir / "out.partial"
    folder.mkdir()
    shard = {"name": "shard-000000.tar", "documents": 2, "tokens": 5, "bytes": 512, "sha256": "0" * 64,
             "index": "shard-000000.index.npy", "index_sha256": "1" * 64}  # fmt: skip
    progress = {"documents": 2, "tokens": 5, "text_bytes": 9, "rejected": {"empty": 1}}
    sound = {"key": "k", "entries": 3, "fingerprint": 5, "rejected_bytes": 4, "progress": progress, "shards": [shard]}

    def read() -> None:
        for name, size in (("shard-000000.tar", 512), ("shard-000000.index.npy", 9), ("rejected.jsonl", 10)):
            (folder / name).write_bytes(b"x" * size)
        state = load_state(folder, "k")
        assert isinstance(state, BuildState) and (folder / "rejected.jsonl").stat().st_size == state.rejected_bytes

    return changed_json(sound), folder / PROGRESS_NAME, read


RUN_CASES = {
    "a checkpoint's progress.json": checkpoint_record,
    "a checkpoint's manifest.json": seal_of_a_checkpoint,
    "a checkpoint's config.yaml": config_of_a_run,
    "rollback.json": rollback_file,
    "events.jsonl": one_of_a_run("events.jsonl"),
    "summary.json": one_of_a_run("summary.json"),
    "env.json": one_of_a_run("env.json"),
    "a parity config": parity_config,
    "a parity record": parity_record,
    "points of a schedule": points_of_a_schedule,
    "quarantine.jsonl": quarantine_ledger,
    "state of an evaluation": state_of_an_evaluation,
    "prompts": prompts_file,
    "state of a build": state_of_a_build,
}


@profiles
@pytest.mark.parametrize("name", RUN_CASES)
def test_files_of_a_run(name: str, profile: str, run_dir: Path) -> None:
    tried(RUN_CASES[name](run_dir), profile)


@profiles
def test_configs_are_refused_or_reported(profile: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {vocab: 100}\ndata: {seq_length: 64}\ntrain:\n  steps: 5\nvalidation: {sequences: 0}\n")

    def check(data: bytes) -> None:
        path.write_bytes(data)
        refused(lambda: _dry_run(path))

    fuzz(changed_yaml(path.read_text()), check, profile)


def _dry_run(path: Path, *words: str) -> None:
    config = load_config(path, words)
    with redirect_stdout(io.StringIO()) as text:
        train._dry_run(config, config.parallel.replica, trust=False)
    assert "parameters" in text.getvalue()


def test_every_whole_number_of_a_config_at_its_bound(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {vocab: 100}\n")
    keys = [path for path, hint in keys_of(Config) if "whole number" in describe_type(hint)]
    assert ("train", "steps") in keys and len(keys) > 40
    for path in keys:
        for value in (10**4, 10**15):
            refused(partial(_dry_run, tmp_path / "config.yaml", f"{'.'.join(path)}={value}"))


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
@pytest.mark.parametrize("name", ["rollback.json", "summary.json", "env.json", "events.jsonl", "config.yaml"])
def test_what_is_no_file_is_not_waited_for(name: str, kind: str, run_dir: Path) -> None:
    path = run_dir / name
    path.unlink()
    {"fifo": os.mkfifo, "folder": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](path)
    shown(run_dir)
    if name == "rollback.json":
        said = refused(lambda: Rollback.read(run_dir))
    elif name == "config.yaml":
        said = refused(lambda: load_config(path))
    else:
        said = "\n".join(inspect(run_dir).notes)
    problem = "is a directory" if kind == "folder" else "is not a regular file"
    assert name == "events.jsonl" or (said is not None and f"{path}: {problem}" in said)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "line 5: more than 20000 values, with what the aliases stand for"),
        ("model: &a {layers: *a}", "line 1: *a holds itself"),
        ("seed: !!int x", 'line 1: "x" is no int that is read here'),
        ("seed: !!timestamp x", "line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:timestamp'"),
        ("seed: " + "9" * 5000, f'line 1: "{"9" * 76}... is no int that is read here'),
        ('run_dir: "\\ud800"', 'line 1: "\\ud800" holds half a surrogate pair'),
        ("seed: " + "[" * 5000, "line 1: nested deeper than 64"),
    ],
)
def test_yaml_that_is_no_config(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert refused(lambda: load_config(path)) == f"{path}, {problem}"
    assert refused(lambda: load_parity_config(path)) == f"{path}, {problem}"


def test_a_run_without_end_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("model: {vocab: 100}\n")
    words = ["train", str(tmp_path / "config.yaml"), "--dry-run"]
    assert main([*words, "train.steps=99999999999999999999"]) == 2
    assert "train.steps must be at most 1e+15, got 99999999999999999999" in capsys.readouterr().err
    assert main([*words, "train.steps=20000000", "data.random_length_fraction=0.01"]) == 2
    assert "train.steps 20000000 is above 10000000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", "3"), ("tokens", 1e300), ("total_tokens", 0), ("step", -1), ("jumps", [[1]]), ("guard", {"x": 1}),
     ("guard", {"recent_losses": ["2.5"]}), ("next_sample_index", None), ("step", 2**63)],
)  # fmt: skip
def test_progress_of_another_type_is_named(key: str, value: object, run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step_00000003"
    (checkpoint / "progress.json").write_text(json.dumps({**RECORD, "progress": {**PROGRESS, key: value}}))
    said = refused(lambda: read_progress(checkpoint))
    assert said is not None and said.startswith(f"{checkpoint / 'progress.json'}: progress: {key}: ")
    if key in ("step", "jumps"):
        path = run_dir / "rollback.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        said = refused(lambda: Rollback.read(run_dir))
        assert said is not None and said.startswith(f"{path}: {key}: ")

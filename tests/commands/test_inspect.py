"""`inspect`: what a run holds, which keys would be refused, and nothing of a foreign run is executed."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_md import cli, run_files
from megatron_md.checkpoint.integrity import seal
from megatron_md.config import config_from_mapping, to_yaml
from tests.checkpoint.saved import write_index

BASE: dict[str, Any] = {"model": {"preset": "tiny", "vocab": 300}, "train": {"steps": 200}}


def config_text(**sections: Any) -> str:
    return to_yaml(config_from_mapping({**BASE, **sections}))


def make_checkpoint(run: Path, step: int, text: str) -> Path:
    path = run / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    record = {
        "format": 2,
        "progress": {"step": step, "next_sample_index": step, "tokens": step * 1000, "total_tokens": 200_000},
        "layout": {"tensor": 2, "pipeline": 1, "data": 4},
        "identity": {},
    }
    (path / "progress.json").write_text(json.dumps(record))
    (path / "config.yaml").write_text(text)
    (path / "__0_0.distcp").write_bytes(b"x" * 5000)
    write_index(path, "__0_0.distcp")
    seal(path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    make_checkpoint(run, 50, config_text(train={"steps": 100}))
    make_checkpoint(run, 100, config_text())
    (run / "checkpoints" / "latest").write_text("step_00000100")
    (run / "config.yaml").write_text(config_text())
    (run / "summary.json").write_text('{"status": "stopped", "step": 100, "stopped_by": "SIGTERM"}')
    (run / "env.json").write_text('{"versions": {"torch": "2.9", "megatron-core": "0.16.1", "apex": null}}')
    (run / "events.jsonl").write_text('{"event": "saved", "time": 0, "step": 100}\n{"event": "st')
    return run


def inspect(*words: object) -> int:
    return cli.main(["inspect", *map(str, words)])


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    code = inspect(*words, "--json")
    return code, json.loads(capsys.readouterr().out)


def test_run_is_told_in_80_columns(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    monkeypatch.setenv("COLUMNS", "80")
    assert inspect("run", "--verify") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for expected in (
        "run: stopped",
        "step 100 of 200, 100,000 of 200,000 tokens",
        "stopped by: SIGTERM",
        "saved step=100",
        "torch 2.9, megatron-core 0.16.1",
        "TP2 DP4",
        "verified, latest",
        "since step_00000050:\n  train.steps: 100 there, 200 now",
    ):
        assert expected in text


def test_json_holds_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = as_json(capsys, run)
    assert code == 0
    assert [(c["step"], c["tokens"], c["state"], c["is_latest"]) for c in found["checkpoints"]] == [
        (50, 50_000, "complete", False),
        (100, 100_000, "complete", True),
    ]
    assert found["total_steps"] == 200
    assert found["checkpoints"][0]["config_changes"] == {"train.steps": [100, 200]}
    files = (run / "checkpoints" / "step_00000100").iterdir()
    assert found["checkpoints"][1]["bytes"] == sum(path.stat().st_size for path in files)


def test_checkpoint_directory_is_taken_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = as_json(capsys, run / "checkpoints" / "step_00000050")
    assert code == 0
    assert [checkpoint["step"] for checkpoint in found["checkpoints"]] == [50]
    assert found["total_steps"] == 100


def test_damage_is_named_and_changes_the_exit_code(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "checkpoints" / "step_00000100" / "__0_0.distcp"
    file.write_bytes(b"y" + b"x" * 4999)
    assert as_json(capsys, run)[0] == 0
    code, found = as_json(capsys, run, "--verify")
    assert code == 1
    assert "__0_0.distcp is damaged" in found["checkpoints"][1]["problem"]
    file.unlink()
    assert as_json(capsys, run)[0] == 1


def test_a_checkpoint_without_its_data_is_not_verified(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "step_00000100"
    for name in ("__0_0.distcp", "manifest.json"):
        (path / name).unlink()
    seal(path)
    code, found = as_json(capsys, run, "--verify")
    assert code == 1 and "takes data from '__0_0.distcp'" in found["checkpoints"][1]["problem"]
    (path / ".metadata").unlink()
    (path / "manifest.json").unlink()
    seal(path)
    assert inspect(run, "--verify") == 1
    assert "verified, latest" not in capsys.readouterr().out


def test_the_last_whole_event_is_shown_whatever_follows_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "events.jsonl").open("ab") as file:
        file.write(b"\n\xff\n5\nnull\n" + b"[" * 100_000 + b"\n" + b"7" * 5000)
    code, found = as_json(capsys, run)
    assert code == 0 and found["last_event"]["event"] == "saved"
    assert found["notes"] == [f"{run / 'events.jsonl'}: lines 2, 3, 4 and 3 more are damaged"]


def test_unsealed_and_unfinished_directories_are_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step_00000050" / "manifest.json").unlink()
    (run / "checkpoints" / ".writing_step_00000150").mkdir()
    (run / "checkpoints" / "step_00000100.bak").mkdir()
    code, found = as_json(capsys, run)
    assert code == 0
    assert found["checkpoints"][0]["state"] == "unsealed"
    assert found["unfinished"] == [".writing_step_00000150"]
    assert len(found["checkpoints"]) == 2 and "step_00000100.bak is no checkpoint of the run" in found["notes"][0]


@pytest.mark.parametrize(
    ("changed", "group", "key"),
    [
        ({"seed": 7}, "refused", "seed"),
        ({"model": {"preset": "tiny", "vocab": 300, "layers": 3}}, "refused", "model.layers"),
        ({"data": {"seq_length": 64}}, "refused", "data.seq_length"),
        ({"objective": {"name": "autoregressive"}}, "refused", "objective.name"),
        ({"model": {"preset": "tiny"}}, "depends", "model.vocab"),
        ({"data": {"train": "elsewhere"}}, "depends", "data.train"),
        ({"train": {"steps": 300}}, "harmless", "train.steps"),
        ({"model": {"preset": "tiny", "vocab": 300, "init_std": 0.5}}, "harmless", "model.init_std"),
        ({"log": {"every_steps": 7}}, "harmless", "log.every_steps"),
    ],
)
def test_changes_are_sorted_by_what_resuming_makes_of_them(
    changed: dict[str, Any], group: str, key: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "next.yaml").write_text(config_text(**changed))
    code, found = as_json(capsys, run, "--against", run.parent / "next.yaml")
    assert code == int(group == "refused")
    assert {name: list(found[name]) for name in ("refused", "depends", "harmless") if found[name]} == {group: [key]}


@pytest.mark.parametrize(
    ("path", "expected"),
    [("nowhere", "no such directory"), ("run/config.yaml", "no such directory"), (".", "neither a run")],
)
def test_other_paths_get_one_line(path: str, expected: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(run.parent / path) == 2
    output = capsys.readouterr()
    assert expected in output.err
    assert output.err.count("\n") == 1


def test_broken_files_are_noted_and_terminal_codes_not_obeyed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "env.json").write_text("{")
    (run / "summary.json").write_text(json.dumps({"status": "\x1b[2J[bold]red\u202e\x9b"}))
    (run / "checkpoints" / "step_00000050" / "progress.json").write_text("[]")
    assert inspect(run) == 1
    text = capsys.readouterr().out
    assert "env.json: malformed JSON" in text
    assert r"\x1b[2J[bold]red\u202e\x9b" in text
    assert not {"\x1b", "\u202e", "\x9b"} & set(text)
    assert "progress.json has 2 bytes instead of" in " ".join(text.split())


def test_a_killed_run_is_told_from_one_that_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "summary.json").write_text('{"status": "running"}')
    said = "it was killed, unless it runs on another machine"
    assert not any(said in note for note in as_json(capsys, run)[1]["notes"])  # nothing is known of a lock
    with (run / run_files.LOCK).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not any(said in note for note in as_json(capsys, run)[1]["notes"])
    assert any(said in note for note in as_json(capsys, run)[1]["notes"])
    (run / "summary.json").write_text('{"status": "finished", "step": 100}')
    assert not any(said in note for note in as_json(capsys, run)[1]["notes"])


def test_neither_torch_nor_the_run_s_imports_are_loaded(run: Path) -> None:
    (run.parent / "evil.py").write_text("open('planted', 'w')\n")
    for path in (run, run / "checkpoints" / "step_00000100"):
        (path / "config.yaml").write_text(config_text(imports=["evil"]))
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "loss": 1.0}\n')
    script = (
        "import sys; from megatron_md.cli import main; main(['inspect', 'run', '--verify']); "
        "main(['plot', 'run']); assert not {'torch', 'megatron', 'evil'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=run.parent, check=True, timeout=120)
    assert not (run.parent / "planted").exists()

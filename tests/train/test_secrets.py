"""A run from a URL with user and password: it trains and resumes, and nothing that it leaves or says holds them."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_md.cli import main
from megatron_md.config import Config, as_dict
from tests.data.file_server import file_server
from tests.train.test_trainer import config_for, metrics, write_bigram_corpus

SECRETS = ("Rosenkohl", "Zwieback", base64.b64encode(b"Rosenkohl:Zwieback").decode())


def train(config: Config, file: Path) -> str:
    """The command line itself; what it says."""
    file.write_text(yaml.safe_dump(json.loads(json.dumps(as_dict(config)))))
    command = [sys.executable, "-m", "megatron_md", "train", str(file)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_no_file_of_a_run_holds_a_secret_and_it_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpora = {
        name: write_bigram_corpus(tmp_path / "www" / name, 40, seed) for seed, name in enumerate(("train", "valid"))
    }
    run_dir = tmp_path / "run"
    with file_server(tmp_path / "www") as server:
        secret = server.url.replace("://", f"://{SECRETS[0]}:{SECRETS[1]}@")
        urls = {name: f"{secret}/{name}" for name in corpora}
        data = {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 10**8}
        config = config_for(run_dir, urls, data=data, train={"steps": 2, "device": "cpu"}, log={"tensorboard": True})
        said = train(config, tmp_path / "config.yaml")
        assert all(SECRETS[2] in str(header) for header in server.authorization.values()) and server.authorization
        # The password changes: that is no change of the run.
        other = {name: url.replace(SECRETS[1], "Kuchen") for name, url in urls.items()}
        config = replace(config, train=replace(config.train, steps=3), data=replace(config.data, **other))
        said += train(config, tmp_path / "config.yaml")
        assert [record["step"] for record in metrics(run_dir)] == [1, 2, 3]
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {"config.yaml", "env.json", "events.jsonl", "summary.json", "rank_0.log"} <= {path.name for path in files}
    for name in (*SECRETS, "Kuchen"):
        assert name not in said
        assert [path for path in files if name.encode() in path.read_bytes()] == []
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["changed"] for event in events if event["event"] == "loaded"] == [{"train.steps": [2, 3]}]
    assert "train: http://***@127.0.0.1:" in (run_dir / "config.yaml").read_text()
    capsys.readouterr()
    assert main(["inspect", str(run_dir), "--against", str(tmp_path / "config.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["refused"], found["depends"], found["harmless"]) == ({}, {}, {})

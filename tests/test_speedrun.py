"""The speedrun's figures: the first validation at a target, and what had been spent by then."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_md.data.shards import load_manifest

SCRIPT = Path(__file__).parent.parent / "examples/speedrun/time_to.py"


def time_to(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)


def test_first_validation_at_a_target(trained: Path) -> None:
    run, corpus = trained / "run", load_manifest(trained / "valid")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(record for record in records if "val_nelbo" in record)
    bits = first["val_nelbo"] * corpus.tokens / corpus.text_bytes / math.log(2.0)
    done = time_to(run, trained / "valid", "--targets", str(bits + 0.001), "0.1", "--price", "3600")
    assert done.returncode == 0, done.stderr
    _, _, reached, never = done.stdout.splitlines()
    cells = [cell.strip() for cell in reached.strip("|").split("|")]
    assert cells[2] == str(first["step"]) and cells[5] == f"{bits:.3f}"
    # One line a step: the time is what the steps took, at 3,600 of money for an hour one a second.
    assert float(cells[6]) == pytest.approx(
        sum(record["step_seconds"] for record in records[: first["step"]]), abs=1e-4
    )
    assert never.startswith("| 0.1 | never; lowest ")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_script_ends_with_a_table_and_a_judgement(trained: Path, tmp_path: Path) -> None:
    for name in ("examples/speedrun", "examples/tiny"):
        shutil.copytree(SCRIPT.parents[2] / name, tmp_path / name)
    (tmp_path / "corpus").mkdir()
    for name in ("train", "valid", "tokenizer.model"):
        (tmp_path / "corpus" / name).symlink_to(trained / name)
    command = "bash examples/speedrun/speedrun.sh"
    smaller = ["train.steps=2", "train.micro_batch_size=2", "train.global_batch_size=8", "model.hidden=32"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    words = [*command.split(), "examples/tiny/demo.yaml", "2", *smaller]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| 1.85 | never; lowest " in done.stdout and "bits per byte\n" in done.stdout
    # What is refused removes nothing.
    done = subprocess.run([*words, "model.heads=3"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and (tmp_path / "runs/speedrun/summary.json").is_file()


def test_what_is_no_run_and_what_was_never_validated_is_told_in_a_line(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"status": "finished", "step": 1}')
    for run in (tmp_path / "nothing", tmp_path / "run"):
        done = time_to(run, trained / "valid")
        assert done.returncode == 2 and str(run) in done.stderr and len(done.stderr.splitlines()) == 1

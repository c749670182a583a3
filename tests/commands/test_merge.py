"""`merge`, and the average of the weights in `evaluate`, `generate` and `convert`: they are one another's test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_md as md
from megatron_md.checkpoint.directory import find_checkpoint
from megatron_md.cli import main
from megatron_md.config import LoraConfig
from tests.checkpoint.test_mean import tensors
from tests.ranks import run_ranks
from tests.small_run import variant
from tests.test_docs import main_in
from tests.train.test_trainer import pretrain
from tests.trained_run import run_config

EMA = {"ema_decay": 0.6, "steps": 4}
SAVES = {"every_steps": 1, "keep_last": 9}
Look = tuple[Path, str]


@pytest.fixture(scope="module")
def runs(trained: Path) -> Path:
    """Beside the runs of `trained`, two with averages: `average`, validated twice by it, and `adapters` on `run`."""
    whole = run_config(trained, "average", checkpoint=SAVES, validation={"every_steps": 2, "weights": "ema"})
    load = {"load": str(trained / "run"), "load_only": "model"}
    adapters = run_config(trained, "adapters", optimizer={"lr": 0.05}, checkpoint={**SAVES, **load})
    run_ranks(pretrain, 1, variant(whole, train=EMA))
    run_ranks(pretrain, 1, replace(variant(adapters, train=EMA), lora=LoraConfig(rank=4)))
    return trained


def looked_at(looks: list[Look], data: Path) -> list[tuple[float, list[int]]]:
    """On a rank: likelihood bound and a text, of the weights of each run or of their average."""
    found = []
    for run, weights in looks:
        keys: dict[str, Any] = {"weights": weights}
        nelbo = md.evaluate(run, data, rows=4, passes=2, seed=1, **keys).nelbo
        found.append((nelbo, list(md.generate(run, "def ", length=8, steps=4, **keys).tokens)))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["average", pytest.param("adapters", marks=pytest.mark.slow)])
def test_the_average_is_what_its_merge_and_its_export_are(name: str, runs: Path, tmp_path: Path) -> None:
    words = [str(runs / name), "--weights", "ema"]
    assert main(["merge", *words, "--last", "1", "--output", str(tmp_path / "merged")]) == 0
    there, back = str(tmp_path / "hf"), str(tmp_path / "back")
    assert main(["convert", words[0], there, "--family", "llada", "--to", "hf", *words[1:]]) == 0
    assert main(["convert", there, back, "--family", "llada", "--to", "megatron"]) == 0
    looks = [(runs / name, "ema"), (tmp_path / "merged", "model"), (runs / name, "model")]
    average, merged, weights = run_ranks(looked_at, 1, looks, runs / "valid")[0]
    assert merged[0] == pytest.approx(average[0], rel=1e-6) and merged[1] == average[1]
    assert abs(weights[0] / average[0] - 1.0) > 1e-5
    # A folder of Hugging Face does not know that the mask token is never predicted: its weights are compared.
    found, expected = (tensors(find_checkpoint(tmp_path / each)) for each in ("back", "merged"))
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=0.0, atol=1e-7)


@pytest.mark.distributed
def test_a_run_and_its_average_are_compared_on_two_ranks(runs: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(runs / "average"), "--nelbo", str(runs / "valid"), "--rows", "4", "--weights", "ema"]
    words += ["--against", str(runs / "average"), "--json", "figures.json"]
    assert run_ranks(main_in, 2, tmp_path, words) == [0, 0]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["run"] == f"{runs}/average/checkpoints/step_00000004 (ema)"
    assert figures["against"]["run"] == f"{runs}/average/checkpoints/step_00000004"
    gap = figures["nelbo"] - figures["against"]["nelbo"]
    assert figures["difference"]["difference"] == pytest.approx(gap, rel=1e-6) and abs(gap) > 1e-3


def test_the_best_are_those_with_the_lowest_recorded_figure(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "best"
    assert main(["merge", str(runs / "average"), "--best", "2", "--output", str(target)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        f"{target}: the mean of step_00000002, step_00000004; train from it with checkpoint.load={target} "
    )
    record = json.loads((target / "checkpoints/step_00000004/progress.json").read_text())
    sources = record["merged"]["checkpoints"]
    assert [Path(source["path"]).name for source in sources] == ["step_00000002", "step_00000004"]
    assert all(source["val_nelbo"] > 0.0 for source in sources)
    assert main(["inspect", str(target), "--verify"]) == 0
    assert "step 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merge", "average", "--best", "3"], "3 checkpoints with a val_nelbo are asked for, and it has 2"),
        (["merge", "average", "--last", "5"], "5 checkpoints complete are asked for, and it has 4"),
        (["merge", "average", "--last", "2", "--output", "run"], "exists already; name another one by --output"),
        (["merge", "run", "--last", "1", "--weights", "ema"], "step_00000002: has no average of the weights"),
        (["merge", "text", "--last", "1"], "text: not the directory of a run with a complete checkpoint"),
        (["evaluate", "run", "--weights", "ema", "--nelbo", "valid"], "step_00000002: has no average of the weights"),
        (["generate", "run", "--weights", "ema"], "step_00000002: has no average of the weights"),
        (
            ["convert", "run", "x", "--family", "llada", "--to", "hf", "--weights", "ema"],
            "has no average of the weights",
        ),
        (
            ["convert", "text", "x", "--family", "llada", "--to", "megatron", "--weights", "ema"],
            "--weights ema is said of",
        ),
    ],
)
def test_what_is_not_there_is_told_in_one_line(
    words: list[str], said: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    before = sorted(runs.iterdir())
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and sorted(runs.iterdir()) == before


@pytest.mark.parametrize("words", [["--last", "0"], ["--steps", "1,x"], [], ["--last", "1", "--best", "1"]])
def test_exactly_one_choice_is_made(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["merge", "run", *words])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1

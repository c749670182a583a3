"""The card of an evaluation: whose figures, by which settings, with which versions; as JSON and as text."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_md import __version__
from megatron_md.evaluate.card import card, identity_of, write_card
from megatron_md.run.saved import Placement, open_run
from tests.evaluate.test_likelihood import evaluate
from tests.ranks import run_ranks


def test_a_card_says_which_weights_settings_and_versions(trained: Path, tmp_path: Path) -> None:
    saved = open_run(trained / "run", Placement(device="cpu"))
    settings = {"draws": 8, "seeds": [1, 2], "tasks": "a", "include_path": tmp_path, "url": "s3://user:word@host/x"}
    content = card("tasks", {"run": saved}, settings, {"t": {"mean": 0.5, "stderr": math.nan}})
    manifest = (saved.checkpoint / "manifest.json").read_bytes()
    assert content["runs"]["run"] == {
        "checkpoint": str(saved.checkpoint),
        "step": 2,
        "checkpoint_sha256": hashlib.sha256(manifest).hexdigest(),
        "weights": "model",
        "base": None,
        "tokenizer_sha256": hashlib.sha256((trained / "run/tokenizer.model").read_bytes()).hexdigest(),
    }
    versions = content["versions"]
    assert torch.__version__.startswith(versions["torch"]) and versions["megatron-md"] == __version__
    assert versions["megatron-core"] and "lm-eval" in versions
    assert content["settings"]["seeds"] == [1, 2] and content["settings"]["include_path"] == str(tmp_path)
    assert "word" not in json.dumps(content) and content["results"]["t"] == {"mean": 0.5, "stderr": None}
    write_card(tmp_path / "figures.json", content)
    assert json.loads((tmp_path / "figures.card.json").read_text()) == content
    lines = dict(line.split(maxsplit=1) for line in (tmp_path / "figures.card.txt").read_text().splitlines())
    assert lines["settings.draws"] == "8" and lines["runs.run.step"] == "2" and lines["settings.seeds"] == "[1, 2]"
    assert lines["results.t.stderr"] == "null" and lines["evaluation"] == "tasks"


def test_a_card_commands_no_terminal(trained: Path, tmp_path: Path) -> None:
    saved = open_run(trained / "run", Placement(device="cpu"))
    write_card(tmp_path / "x", card("nelbo", {"run": saved}, {"nelbo": ["a\x1b]0;b\x07\nc"]}, {"found": "a\x1bb\nc"}))
    text = (tmp_path / "x.card.txt").read_text()
    assert "\x1b" not in text and "\x07" not in text and r"a\x1bb\nc" in text


def test_other_weights_have_another_identity(trained: Path) -> None:
    run, causal = (identity_of(open_run(trained / name, Placement(device="cpu"))) for name in ("run", "causal"))
    assert (
        run["checkpoint_sha256"] != causal["checkpoint_sha256"]
        and run["tokenizer_sha256"] == causal["tokenizer_sha256"]
    )


@pytest.mark.distributed
def test_the_command_writes_a_card_beside_its_figures(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "nelbo.json"
    words = ["--nelbo", str(trained / "valid"), "--rows", "4", "--json", str(output), "--against", str(trained / "run")]
    assert run_ranks(evaluate, 1, str(trained / "run"), *words) == [0]
    content: dict[str, Any] = json.loads((tmp_path / "nelbo.card.json").read_text())
    assert content["results"] == json.loads(output.read_text()) and content["evaluation"] == "nelbo"
    assert content["settings"]["estimator"] == "complementary" and content["settings"]["passes"] == 2
    assert content["runs"].keys() == {"run", "against"} and content["machine"]["world_size"] == 1
    assert (tmp_path / "nelbo.card.txt").is_file()

"""Opening a run for evaluation: what a foreign one may not do, and what causal objectives are told by."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_md.checkpoint.directory import FORMAT_VERSION
from megatron_md.checkpoint.integrity import CheckpointError, seal
from megatron_md.config import config_from_mapping, to_yaml
from megatron_md.evaluate.load import is_causal
from megatron_md.run.saved import Placement, SavedRun, open_run

PLUGIN = """
from pathlib import Path
from megatron_md.diffusion.objective import Autoregressive, register_objective
Path(__file__).with_name("planted").touch()

@register_objective("leftward")
class Leftward(Autoregressive):
    name = "leftward"
"""


def checkpoint(tmp_path: Path, *, identity: dict[str, Any], **sections: Any) -> Path:
    path = tmp_path / "run" / "checkpoints" / "step_00000001"
    path.mkdir(parents=True)
    progress = {"step": 1, "next_sample_index": 8, "tokens": 8, "total_tokens": 80}
    (path / "progress.json").write_text(
        json.dumps({"format": FORMAT_VERSION, "progress": progress, "identity": identity})
    )
    (path / "config.yaml").write_text(
        to_yaml(config_from_mapping({"model": {"preset": "tiny", "vocab": 300}, **sections}))
    )
    (tmp_path / "run" / "tokenizer.model").touch()
    (tmp_path / "foreign_plugin.py").write_text(PLUGIN)
    return path


def saved(path: Path, *, trust: bool = False) -> SavedRun:
    return open_run(path, Placement(trust=trust))


def test_unsealed_checkpoint_needs_trust(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, identity={})
    with pytest.raises(CheckpointError, match="--trust"):
        saved(path)
    assert saved(path, trust=True).step == 1
    seal(path)
    assert saved(path).step == 1


@pytest.mark.parametrize(("name", "expected"), [("autoregressive", True), ("masked_diffusion", False)])
def test_causal_is_what_the_objective_says(name: str, expected: bool, tmp_path: Path) -> None:
    run = saved(checkpoint(tmp_path, identity={}, objective={"name": name}), trust=True)
    assert is_causal(run, mask_token_id=3) is expected


@pytest.mark.parametrize("recorded", [True, False])
def test_record_tells_without_importing_anything(
    recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys: dict[str, Any] = {"objective": {"name": "leftward"}, "imports": ["foreign_plugin"]}
    path = checkpoint(tmp_path, identity={"objective is causal": recorded}, **keys)
    seal(path)
    assert is_causal(saved(path), mask_token_id=3) is recorded
    assert not (tmp_path / "planted").exists()


def test_imports_of_a_foreign_run_need_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = checkpoint(tmp_path, identity={}, objective={"name": "leftward"}, imports=["foreign_plugin"])
    seal(path)
    with pytest.raises(CheckpointError, match=r"imports foreign_plugin.*--trust"):
        is_causal(saved(path), mask_token_id=3)
    assert not (tmp_path / "planted").exists()
    assert is_causal(saved(path, trust=True), mask_token_id=3) is True
    assert (tmp_path / "planted").exists()

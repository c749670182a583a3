"""The processes that simulate: which stages, and what is heard of one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_md.errors import RunFailedError
from megatron_md.simulate import children
from megatron_md.simulate.children import simulate, stages_to_simulate
from tests.simulate.made_up import run


@pytest.mark.parametrize(("pipeline", "stages"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (8, [0, 1, 7])])
def test_ends_and_one_stage_between_are_simulated(pipeline: int, stages: list[int]) -> None:
    assert stages_to_simulate(pipeline) == stages


def test_a_worker_that_dies_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guard.so").write_text("no library")
    monkeypatch.setattr(children, "guard_library", lambda: tmp_path / "guard.so")
    with pytest.raises(RunFailedError, match=r"the simulation of rank 0 of 1 failed: OSError: .*guard\.so"):
        simulate([run(1)])

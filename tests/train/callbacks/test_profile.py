"""The profiler records the steps of its window and no others, also where the run ends within it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_md.config import ProfileConfig
from megatron_md.train.callbacks.profile import Profiler


def profiled(keys: ProfileConfig, run_dir: Path, first: int, last: int) -> set[int] | None:
    """The steps of a run from `first` to `last` that the trace of rank 3 holds; None where there is no trace."""
    world = SimpleNamespace(rank=3, device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(progress=SimpleNamespace(step=first - 1), world=world)
    profiler = Profiler(keys, run_dir)
    profiler.on_start(trainer)
    for step in range(first, last + 1):
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(8).sum()
        trainer.progress.step = step
        profiler.after_step(trainer, {})
    profiler.on_end(trainer)
    path = run_dir / "profile" / "rank_3.json"
    if not path.exists():
        return None
    assert "aten::sum" in path.with_suffix(".txt").read_text()
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    return {int(name.removeprefix("step ")) for name in names if name.startswith("step ")}


@pytest.mark.parametrize(
    ("keys", "first", "last", "expected"),
    [
        (ProfileConfig(start=2, steps=2), 1, 6, {3, 4}),
        (ProfileConfig(start=0, steps=1), 1, 3, {1}),
        (ProfileConfig(start=4, steps=3), 5, 9, {5, 6, 7}),  # a run that was resumed where the window opens
        (ProfileConfig(start=2, steps=9), 1, 4, {3, 4}),  # cut short
        (ProfileConfig(start=2, steps=0), 1, 4, None),
        (ProfileConfig(start=2, steps=2), 4, 6, None),  # resumed within it
    ],
)
def test_a_window_of_steps_is_recorded(
    keys: ProfileConfig, first: int, last: int, expected: set[int] | None, tmp_path: Path
) -> None:
    assert profiled(keys, tmp_path, first, last) == expected

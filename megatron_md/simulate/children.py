"""Simulations in processes of their own, as each changes torch for good: one for each pipeline stage of each layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_md.config import ConfigError, ResolvedConfig, as_dict
from megatron_md.errors import RunFailedError
from megatron_md.processes import PARENT_VARIABLE, scratch_folder
from megatron_md.run.check import Layout
from megatron_md.simulate.guard import guard_library
from megatron_md.simulate.stage import Stage

Run = tuple[ResolvedConfig, Layout]


def stages_to_simulate(pipeline: int) -> list[int]:
    """The first stage, one of those between, which are alike, and the last."""
    return sorted({0, min(1, pipeline - 1), pipeline - 1})


def simulate(
    runs: Sequence[Run], *, trust: bool = False, done: Callable[[], None] = lambda: None
) -> list[list[Stage]]:
    """The simulated stages of each run, as many at once as this process has cores.

    Args:
        runs: checked configs and their layouts.
        trust: import what the configs name also from the working directory.
        done: called after each simulation.

    Raises:
        UserError: a config cannot be built, or there is no C++ compiler.
        RunFailedError: a simulation fails otherwise.
    """
    guard = str(guard_library())
    jobs = [
        {
            "guard": guard,
            "config": as_dict(config),
            "trust": trust,
            "world_size": layout.world,
            "rank": stage * (layout.world // layout.pipeline),  # the pipeline's ranks lie furthest apart
            "micro_batches": layout.micro_batches,
        }
        for config, layout in runs
        for stage in stages_to_simulate(layout.pipeline)
    ]
    with scratch_folder() as folder, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for number, job in enumerate(jobs):
            job["output"] = str(folder / f"{number}.json")

        def work(job: dict[str, Any]) -> Stage:
            stage = _simulated(job)
            done()
            return stage

        stages = iter(list(pool.map(work, jobs)))
    return [[next(stages) for _ in stages_to_simulate(layout.pipeline)] for _, layout in runs]


def _simulated(job: dict[str, Any]) -> Stage:
    # Whoever starts this process from a checkout has the package on the path of this process only.
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        PARENT_VARIABLE: str(os.getpid()),
        "RANK": str(job["rank"]),
        "WORLD_SIZE": str(job["world_size"]),
        "LOCAL_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron-core wants it on devices where it matters
        "MEGATRON_MD_TRACEBACK": "1",
    }
    words = [sys.executable, "-P", "-m", "megatron_md.simulate.worker"]
    child = subprocess.run(words, input=json.dumps(job), env=environment, capture_output=True, text=True, check=False)
    output = Path(job["output"])
    found = json.loads(output.read_text()) if output.exists() else {}
    if "refused" in found:
        raise ConfigError(found["refused"])
    if child.returncode or not found:
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise RunFailedError(f"the simulation of rank {job['rank']} of {job['world_size']} failed: {last}")
    return Stage.from_dict(found)

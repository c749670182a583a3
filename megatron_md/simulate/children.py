"""Simulations in processes of their own, as each changes torch for good: one for each pipeline stage of each layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_md.config import ConfigError, ResolvedConfig, as_dict
from megatron_md.errors import RunFailedError
from megatron_md.processes import PARENT_VARIABLE, scratch_folder
from megatron_md.run.check import Layout
from megatron_md.simulate.guard import guard_library
from megatron_md.simulate.stage import Stage

DONE = b"done\n"  # what a worker says for each job

Run = tuple[ResolvedConfig, Layout]


def stages_to_simulate(pipeline: int) -> list[int]:
    """The first stage, one of those between, which are alike, and the last."""
    return sorted({0, min(1, pipeline - 1), pipeline - 1})


def simulate(runs: Sequence[Run], *, trust: bool = False, done: Callable[[], None] = lambda: None) -> list[list[Stage]]:
    """The simulated stages of each run, as many at once as this process has cores.

    Args:
        runs: checked configs and their layouts.
        trust: import what the configs name also from the working directory.
        done: called after each simulation.

    Raises:
        UserError: a config cannot be built, or there is no C++ compiler.
        RunFailedError: a simulation fails otherwise.
    """
    guard = guard_library()
    with scratch_folder() as folder:
        jobs = [
            {
                "config": as_dict(config),
                "world_size": layout.world,
                "rank": stage * (layout.world // layout.pipeline),  # the pipeline's ranks lie furthest apart
                "micro_batches": layout.micro_batches,
                "output": str(folder / f"{number}-{stage}.json"),
            }
            for number, (config, layout) in enumerate(runs)
            for stage in stages_to_simulate(layout.pipeline)
        ]
        given = {"guard": str(guard), "trust": trust, "at_once": len(os.sched_getaffinity(0)), "jobs": jobs}
        errors = _run(given, folder / "errors", done)
        stages = iter([_found(job, errors) for job in jobs])
    return [[next(stages) for _ in stages_to_simulate(layout.pipeline)] for _, layout in runs]


def _run(given: dict[str, Any], log: Path, done: Callable[[], None]) -> str:
    """Have all jobs done; what was said on stderr meanwhile, which goes to `log`."""
    environment = {
        **os.environ,
        # Whoever starts this process from a checkout has the package on the path of this process only.
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))),
        PARENT_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    words = [sys.executable, "-P", "-m", "megatron_md.simulate.worker"]
    with log.open("wb") as errors:
        worker = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    with worker:
        assert worker.stdin is not None and worker.stdout is not None
        with suppress(BrokenPipeError):  # it has died, and its log says why
            worker.stdin.write(json.dumps(given).encode())
            worker.stdin.close()
        for line in worker.stdout:
            if line == DONE:
                done()
    return log.read_text(encoding="utf-8", errors="replace")


def _found(job: dict[str, Any], errors: str) -> Stage:
    output = Path(job["output"])
    found = json.loads(output.read_text()) if output.exists() else {"failed": errors}
    if "refused" in found:
        raise ConfigError(found["refused"])
    if "failed" in found:
        last = (found["failed"].strip().splitlines() or ["no output"])[-1]
        raise RunFailedError(f"the simulation of rank {job['rank']} of {job['world_size']} failed: {last}")
    return Stage.from_dict(found)

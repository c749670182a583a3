"""`python -m megatron_md.simulate.worker`: simulates the ranks that `children` sends it on stdin, each in a fork.

Torch and megatron-core are imported once, and what each simulation changes for good stays in its fork.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_md.config import config_from_mapping, resolve
from megatron_md.errors import UserError
from megatron_md.processes import die_with_parent, end_with_launcher
from megatron_md.simulate.children import DONE


def main() -> None:
    """Read the jobs, and write what each finds to the file that it names; a line on stdout tells that one is done."""
    given = json.load(sys.stdin)
    from megatron_md.simulate import guard

    guard.load(Path(given["guard"]))
    warnings.filterwarnings("ignore")

    from megatron_md.simulate import fake_cuda
    from megatron_md.simulate.meter import Meter

    meter = Meter()
    fake_cuda.activate(meter.fused)
    from megatron_md.plugins import import_plugins
    from megatron_md.simulate.step import simulate_stage

    def simulate(job: dict[str, Any]) -> dict[str, Any]:
        os.environ.update(RANK=str(job["rank"]), WORLD_SIZE=str(job["world_size"]), LOCAL_RANK="0")
        try:
            config = resolve(config_from_mapping(job["config"]))
            import_plugins(config, trust=given["trust"])
            return simulate_stage(config, meter, job["micro_batches"]).as_dict()
        except UserError as error:
            return {"refused": getattr(error, "lines", None) or [str(error)]}
        except Exception:
            return {"failed": traceback.format_exc()}

    running = 0
    for job in given["jobs"]:
        if running == given["at_once"]:
            os.wait()
            running -= 1
        _fork(simulate, job)
        running += 1
    for _ in range(running):
        os.wait()


def _fork(simulate: Callable[[dict[str, Any]], dict[str, Any]], job: dict[str, Any]) -> None:
    parent = os.getpid()
    if os.fork() == 0:
        die_with_parent(parent)
        Path(job["output"]).write_text(json.dumps(simulate(job)))
        os.write(1, DONE)
        os._exit(0)  # nothing of what is pretended here can be shut down


if __name__ == "__main__":
    end_with_launcher()
    main()

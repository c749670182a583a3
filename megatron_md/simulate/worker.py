"""A process that simulates one rank: `python -m megatron_md.simulate.worker` with a job on stdin (see `children`)."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

from megatron_md.config import config_from_mapping, resolve
from megatron_md.errors import UserError
from megatron_md.processes import end_with_launcher


def main() -> None:
    """Read the job, simulate, write what was found to the file that the job names."""
    job = json.load(sys.stdin)
    from megatron_md.simulate import guard

    guard.load(Path(job["guard"]))
    warnings.filterwarnings("ignore")

    from megatron_md.simulate import fake_cuda
    from megatron_md.simulate.meter import Meter

    meter = Meter()
    fake_cuda.activate(job["rank"], job["world_size"], meter.fused)
    from megatron_md.plugins import import_plugins
    from megatron_md.simulate.step import simulate_stage

    config = resolve(config_from_mapping(job["config"]))
    try:
        import_plugins(config, trust=job["trust"])
        found = simulate_stage(config, meter, job["micro_batches"]).as_dict()
    except UserError as error:
        found = {"refused": getattr(error, "lines", None) or [str(error)]}
    Path(job["output"]).write_text(json.dumps(found))
    os._exit(0)  # nothing of what is pretended here can be shut down


if __name__ == "__main__":
    end_with_launcher()
    main()

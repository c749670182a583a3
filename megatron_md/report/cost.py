"""What a run has cost: FLOPs, the time that it held devices, and money."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import pairwise

from megatron_md.report.recorded import Recorded
from megatron_md.run.estimate import padded_vocab, training_flops_per_token
from megatron_md.train.records import is_number


def training_flops(run: Recorded) -> float | None:
    """FLOPs of the tokens trained so far, recomputation included; None where config or metrics do not tell.

    What is counted is told in `training_flops_per_token`. Steps that a rollback or a crash has undone are left out.
    """
    tokens = run.records[-1].get("tokens") if run.records else None
    if run.config is None or not is_number(tokens):
        return None
    try:
        return float(
            tokens * training_flops_per_token(run.config, padded_vocab(run.config), recomputation=True)  # type: ignore[operator]
        )
    except (ValueError, ArithmeticError):  # a schedule of a module that is not imported here
        return None


def device_hours(run: Recorded) -> float | None:
    """Hours that the run has held devices (or CPU processes): those of each start times its processes.

    From each start to the last sign of life before the next one: validation, saves and steps that were undone
    included, the time between starts not. None where the files tell no time.
    """
    times = sorted(float(line["time"]) for line in (*run.events, *run.records) if is_number(line.get("time")))
    if not times:
        return None
    started = [line for line in run.events if line["event"] == "started" and is_number(line.get("time"))]
    starts = sorted((float(line["time"]), _processes(line.get("world_size"), run)) for line in started)
    starts = starts or [(times[0], _processes(None, run))]
    total = 0.0
    for (start, processes), (following, _) in pairwise([*starts, (math.inf, 0)]):
        last = times[bisect_left(times, following) - 1]
        total += max(last - start, 0.0) * processes
    return total / 3600 if math.isfinite(total) else None


def _processes(recorded: object, run: Recorded) -> int:
    for count in (recorded, run.found.environment.get("world_size")):
        if type(count) is int and 0 < count < 10**7:
            return count
    return 1

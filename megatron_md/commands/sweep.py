"""`megatron-md sweep STUDY.yaml`: train every arm with every seed, and compare them."""

from __future__ import annotations

import argparse
import math

from megatron_md.commands.arguments import positive
from megatron_md.errors import UserError
from megatron_md.messages import say

EXAMPLES = """examples:
  megatron-md sweep study.yaml --dry-run
  megatron-md sweep study.yaml --workers 2
  megatron-md sweep study.yaml --only "$SLURM_ARRAY_TASK_ID"      (one run of it; sbatch --array=0-N)

A study file is a training config with a section `sweep`: `arms` (name: list of section.key=value), `seeds`, and `grid`
(section.key: list of values). Runs lie in `run_dir`/ARM/seed_N; what is done already is not done again, what was killed
goes on. RUN_DIR/results.csv has a line for each finished run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("study", metavar="STUDY.yaml", help="a training config with a section `sweep`")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="keys to change")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument("--only", type=int, metavar="I", help="run number I alone, from 0, and write no table")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what they cost")


def run(args: argparse.Namespace) -> int:
    """Run, or list, what the study asks for.

    Raises:
        UserError: bad input.
    """
    from megatron_md.sweep.study import Study, flops, summary_of

    study = Study(args.study, args.overrides)
    if args.dry_run:
        costs = [flops(run.config) for run in study.runs]
        for number, (run, cost) in enumerate(zip(study.runs, costs, strict=True)):
            done = "done" if summary_of(run) else "to do"
            say(f"{number:4d}  {done:5s}  {cost:9.3g} FLOPs  {run.directory}")
        say(f"{len(study.runs)} runs, {math.fsum(costs):.3g} FLOPs")
        return 0
    if args.only is not None and not 0 <= args.only < len(study.runs):
        raise UserError(f"--only {args.only}: the study has runs 0 to {len(study.runs) - 1}")
    rows, failed = study.run(args.workers, only=args.only)
    for row in rows:
        say(f"{row['run']:50s} NELBO {row['val_nelbo']:.4f} +- {row['val_nelbo_stderr']:.4f}")
    return 1 if failed else 0

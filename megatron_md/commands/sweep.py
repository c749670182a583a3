"""`megatron-md sweep STUDY.yaml`: train every arm with every seed, and compare them."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from megatron_md.commands.arguments import positive
from megatron_md.errors import UserError
from megatron_md.messages import say

if TYPE_CHECKING:
    from megatron_md.sweep.study import Study

EXAMPLES = """examples:
  bash examples/studies/corpora.sh                                     # what the next lines train on
  megatron-md sweep examples/studies/windows.yaml --dry-run
  megatron-md sweep examples/studies/windows.yaml --workers 2
  megatron-md sweep examples/studies/windows.yaml --only 0             # one run; in a Slurm array $SLURM_ARRAY_TASK_ID
  megatron-md sweep examples/studies/windows.yaml --report --reference "[0.4, 0.5]"

A study file is a training config with a section `sweep`: `arms` (name: list of section.key=value), `seeds`, and `grid`
(section.key: list of values). Runs lie in `run_dir`/ARM/seed_N; what is done already is not done again, what was killed
goes on. RUN_DIR/results.csv (and .jsonl) has a line for each finished run; report.md compares the arms, with pictures.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("study", metavar="STUDY.yaml", help="a training config with a section `sweep`")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="keys to change")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="runs at a time (1)")
    parser.add_argument("--only", type=int, metavar="I", help="run number I alone, from 0, and write no table")
    parser.add_argument("--report", action="store_true", help="run nothing: compare the runs that are done")
    parser.add_argument("--reference", metavar="ARM", help="the arm that others are compared with (the first)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what they cost")


def run(args: argparse.Namespace) -> int:
    """Run, or list, what the study asks for.

    Raises:
        UserError: bad input.
    """
    from megatron_md.sweep.study import Study

    study = Study(args.study, args.overrides)
    names = {run.arm: None for run in study.runs}
    if args.reference is not None and args.reference not in names:
        raise UserError(f"--reference {args.reference}: the study has the arms {', '.join(names)}")
    if args.dry_run:
        return _tell_costs(study)
    if args.only is not None and not 0 <= args.only < len(study.runs):
        raise UserError(f"--only {args.only}: the study has runs 0 to {len(study.runs) - 1}")
    failed = 0
    if args.report:
        study.collect()
    else:
        rows, failed = study.run(args.workers, only=args.only)
        if args.only is not None or not rows:
            return 1 if failed else 0
    from megatron_md.sweep.report import REPORT_NAME, write_report

    say(write_report(study.directory, args.reference), multiline=True)
    say(f"{study.directory / REPORT_NAME} written")
    return 1 if failed else 0


def _tell_costs(study: Study) -> int:
    """Each run with its FLOPs, and the hours by what finished runs took."""
    from megatron_md.sweep.study import flops, summary_of

    costs = [flops(run.config) for run in study.runs]
    done = [summary_of(run) for run in study.runs]
    seconds = math.fsum(summary["seconds"] for summary in done if summary)
    spent = math.fsum(cost for cost, summary in zip(costs, done, strict=True) if summary)
    for number, (run, cost, summary) in enumerate(zip(study.runs, costs, done, strict=True)):
        hours = f"{cost * seconds / spent / 3600:7.3f} h" if spent else ""
        say(f"{number:4d}  {'done' if summary else 'to do':5s}  {cost:9.3g} FLOPs  {hours}  {run.directory}")
    whole = math.fsum(costs)
    hours = (
        f", {(whole - spent) * seconds / spent / 3600:.2f} hours left, one run at a time"
        if spent
        else ("; hours are known once a run is done, such as with --only 0")
    )
    say(f"{len(costs)} runs, {whole:.3g} FLOPs{hours}")
    return 0

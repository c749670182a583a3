"""`megatron-md report RUN [RUN2 ...]`: all that runs found, as one page."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from megatron_md.errors import UserError
from megatron_md.files import replace_file
from megatron_md.messages import say
from megatron_md.report.page import report_page
from megatron_md.report.recorded import read_runs

WATCH_SECONDS = 60.0

EXAMPLES = """examples:
  megatron-md report runs/demo
  megatron-md report runs/demo --price 2.5                 # of a device-hour, in your currency
  megatron-md report runs/demo runs/other --output compared.html
  megatron-md report runs/demo --watch 30                  # until the run has ended; Ctrl-C stops it sooner

The page is one file that loads nothing: curves, mask schedule, samples, cost, config, events, environment. Several runs
share its charts, and of their configs the keys are shown in which they differ.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run directory; several are compared")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html", help="page to write; RUN/report.html, of several runs report.html"
    )
    parser.add_argument("--price", type=_positive, metavar="MONEY", help="of a device-hour, for the cost of the run")
    parser.add_argument(
        "--watch",
        type=_positive,
        nargs="?",
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"write the page anew that often while a run lasts ({WATCH_SECONDS:g})",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is.

    Raises:
        UserError: a path is no run, or the page cannot be written there.
    """
    default = args.run_dirs[0] / "report.html" if len(args.run_dirs) == 1 else Path("report.html")
    output: Path = args.output or default
    if output.is_dir():
        raise UserError(f"--output {output}: a directory; name the page to write, such as {output / 'report.html'}")
    is_running = _write(args.run_dirs, output, args.price, args.watch)
    say(output)
    try:
        while args.watch is not None and is_running:
            time.sleep(args.watch)
            is_running = _write(args.run_dirs, output, args.price, args.watch)
    except KeyboardInterrupt:
        _write(args.run_dirs, output, args.price, None)  # nobody writes it anew: it need not be loaded again
    return 0


def _write(run_dirs: list[Path], output: Path, price: float | None, watch: float | None) -> bool:
    """Write the page, which refreshes itself while it is watched and a run lasts; says whether one does."""
    runs = read_runs(run_dirs)
    is_running = any(found.is_running for found in runs)
    page = report_page(runs, price=price, refresh_seconds=watch if is_running else None)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, page)
    return is_running


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}; RUN comes before the options")
    return value

"""`megatron-md inspect RUN`: what a run or a checkpoint holds, in 80 columns or as JSON."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_md.checkpoint.contract import reason
from megatron_md.messages import redacted, say, shown
from megatron_md.run.epochs import told_passes
from megatron_md.run.inspection import Changes, Inspection, compare_config, inspect, newest_checkpoint

EXAMPLES = """examples:
  megatron-md inspect runs/demo
  megatron-md inspect runs/demo --verify                 # reads every byte of every checkpoint
  megatron-md inspect runs/demo --against next.yaml      # can this config resume the newest checkpoint?
  megatron-md inspect runs/demo/checkpoints/step_00000100 --json

exit codes: 0 as it should be, 1 a checkpoint is damaged or --against would be refused, 2 nothing to inspect
"""

_SIZES = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VPP", "context": "CP", "data": "DP"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", type=Path, metavar="RUN", help="run directory or checkpoint")
    parser.add_argument("--verify", action="store_true", help="read every checkpoint and compare its hashes")
    parser.add_argument("--against", type=Path, metavar="CONFIG.yaml", help="say what would keep it from resuming")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Inspect and print.

    Raises:
        UserError: the path is no run and no checkpoint, or `--against` is no config.
    """
    found = inspect(args.path, verified=args.verify)
    if args.against is not None:
        compare_config(found, args.against)
    if args.json:
        # DEL is the one control character that JSON leaves as it is.
        say(json.dumps(redacted(asdict(found)), indent=1).replace("\x7f", "\\u007f"), multiline=True)
    else:
        show(found, verified=args.verify, against=args.against)
    return int(bool(found.refused) or any(checkpoint.state == "damaged" for checkpoint in found.checkpoints))


def show(found: Inspection, *, verified: bool, against: Path | None) -> None:
    """Print an inspection.

    Args:
        found: what to print.
        verified: hashes were compared, not only names and sizes.
        against: the config that was compared.
    """
    console = Console(highlight=False, soft_wrap=True)
    _show_state(console, found)
    if found.checkpoints:
        console.print()
        Console(highlight=False).print(_table(found, verified))
    for checkpoint in found.checkpoints:
        if checkpoint.problem:
            _print(console, f"{Path(checkpoint.path).name}: {checkpoint.state}: {checkpoint.problem}", "red")
    if found.unfinished:
        _print(console, f"cut short, removed by the next save: {', '.join(found.unfinished)}")
    for note in found.notes:
        _print(console, f"note: {note}", "red")
    for checkpoint in found.checkpoints:
        if checkpoint.config_changes:
            _print(console, f"\nconfig.yaml has changed since {Path(checkpoint.path).name}:")
            _show_changes(console, checkpoint.config_changes)
    if against is not None:
        _show_comparison(console, found, against)


def _show_state(console: Console, found: Inspection) -> None:
    newest = newest_checkpoint(found)
    is_checkpoint = newest is not None and newest.path == found.path
    status = "checkpoint" if is_checkpoint else str(found.status.get("status", "unknown"))
    _print(console, f"{found.path}: {status}", "bold")
    step = found.status.get("step")
    if not isinstance(step, int):
        step = newest.step if newest else None
    if isinstance(step, int):
        total = f" of {found.total_steps}" if found.total_steps else ""
        tokens = ""
        if newest is not None and newest.step == step and newest.tokens is not None:
            tokens = f", {newest.tokens:,} of {newest.total_tokens:,} tokens"
        _print(console, f"step {step}{total}{tokens}")
    for line in told_passes(found.status.get("corpora")):
        _print(console, line)
    best = found.status.get("best_val_nelbo")
    if isinstance(best, (int, float)):
        _print(console, f"lowest val_nelbo {best:.4f}, at step {found.status.get('best_val_step')}")
    if newest is not None and newest.base is not None:
        _print(console, f"holds adapters on the weights of {newest.base}")
    for key in ("error", "stopped_by"):
        if found.status.get(key):
            _print(console, f"{key.replace('_', ' ')}: {found.status[key]}")
    if found.last_event:
        details = {key: value for key, value in found.last_event.items() if key not in ("time", "event")}
        said = " ".join(f"{key}={_value(value)}" for key, value in details.items())
        _print(console, f"last event: {_time(found.last_event.get('time'))} {found.last_event.get('event')} {said}")
    versions = found.environment.get("versions")
    if isinstance(versions, dict):
        names = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        _print(console, f"written with {names}")


def _table(found: Inspection, verified: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("checkpoint", "saved", "size", "layout", "format", "state"):
        table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
    for checkpoint in found.checkpoints:
        state = "verified" if verified and checkpoint.state == "complete" else checkpoint.state
        cells = (
            Path(checkpoint.path).name,
            _time(checkpoint.saved),
            _size(checkpoint.bytes),
            _layout(checkpoint.layout),
            "" if checkpoint.format is None else str(checkpoint.format),
            state + (", latest" if checkpoint.is_latest else ""),
        )
        style = "red" if checkpoint.problem else ""
        table.add_row(*(Text(shown(cell), style) for cell in cells))
    return table


def _show_comparison(console: Console, found: Inspection, against: Path) -> None:
    newest = newest_checkpoint(found)
    name = Path(newest.path).name if newest else ""
    verdict = "would be refused" if found.refused else "may be refused, see below" if found.depends else "can resume"
    _print(console, f"\n{against} at {name}: {verdict}", "bold")
    for title, changes in (("refused", found.refused), ("depends", found.depends), ("harmless", found.harmless)):
        if changes:
            _print(console, f"{title}:", "red" if title == "refused" else "")
            _show_changes(console, changes, reasons=title == "depends")


def _show_changes(console: Console, changes: Changes, *, reasons: bool = False) -> None:
    for key, (there, now) in changes.items():
        text = f"  {key}: {_value(there)} there, {_value(now)} now"
        _print(console, f"{text} ({reason(key)})" if reasons else text)


def _print(console: Console, text: str, style: str = "") -> None:
    """A foreign run's words are shown as they are, without markup or what a terminal would obey."""
    console.print(Text(shown(text, multiline=True), style))


def _value(value: Any) -> str:
    text = redacted(value if isinstance(value, str) and value else json.dumps(value, default=str))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _time(seconds: Any) -> str:
    if not isinstance(seconds, (int, float)):
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # a number that is no time
        return ""


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _layout(layout: dict[str, int]) -> str:
    """`TP2 PP2`: the sizes above 1."""
    sizes = [f"{_SIZES.get(name, name + ' ')}{size}" for name, size in layout.items() if size > 1]
    return " ".join(sizes) if sizes else "1" if layout else ""

"""What a run writes about itself: metrics.jsonl, TensorBoard and other trackers, the terminal, summary.json, events."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_md import run_files
from megatron_md.config import Config
from megatron_md.config.training import LogConfig
from megatron_md.files import append, replace_file
from megatron_md.installed import version
from megatron_md.messages import redacted, tell
from megatron_md.train.callback import Callback, Record, StepResult
from megatron_md.train.logs import logger
from megatron_md.train.records import damage, read_lines
from megatron_md.train.trainer import Trainer

BARS = "▁▂▃▄▅▆▇█"
CURVE = 20  # validations that the terminal shows as a curve


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that readers see the old or the new file, never a part."""
    replace_file(path, json.dumps(without_nan(value), indent=1) + "\n")


def without_nan(value: Any) -> Any:
    """The same figures with null for what is not a finite number, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_event(run_dir: Path, name: str, **details: Any) -> None:
    """Append a line to RUN/events.jsonl: starts, saves, signals, skips; if it fails, tell it on the terminal."""
    path = run_dir / run_files.EVENTS
    line = json.dumps(redacted(without_nan({"time": time.time(), "event": name, **details})))
    try:
        append(path, line + "\n")
    except OSError as error:
        tell(f"megatron-md: {path} cannot be written ({error.strerror}): {line}")


def environment(world_size: int) -> dict[str, Any]:
    """Versions and hardware, for RUN/env.json."""
    packages = ("torch", "megatron-core", "numpy", "sentencepiece", "transformer-engine", "apex")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: version(package) for package in packages},
        "world_size": world_size,
        "cpu_count": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def truncate_metrics(path: Path, step: int) -> None:
    """Cut metrics.jsonl or samples.jsonl back to `step`, where a resumed run goes on; all whole lines before it stay.

    Damaged lines, a torn last one too, are told and moved to FILE.damaged, where they are on disk before they go here.
    """
    lines = read_lines(path)
    if problem := damage(path, lines):
        _keep_aside(path.with_name(f"{path.name}.damaged"), [line.content for line in lines if line.record is None])
        tell(f"megatron-md: {problem} and moved to {path.name}.damaged")
        numbers = [line.number for line in lines if line.record is None]
        append_event(path.parent, "lines_damaged", file=path.name, count=len(numbers), lines=numbers[:20])
    if path.is_file():
        kept = [line.content + b"\n" for line in lines if line.record is not None and line.record["step"] <= step]
        replace_file(path, b"".join(kept))


def _keep_aside(path: Path, lines: list[bytes]) -> None:
    damaged = b"".join(line + b"\n" for line in lines)
    before = path.read_bytes() if path.is_file() else b""
    # A crash may have come between this file and the cut: the lines are there then.
    if not (b"\n" + before).endswith(b"\n" + damaged):
        replace_file(path, before + damaged)


class MetricsWriter(Callback):
    """Averages speed since the last line and writes one record per `log.every_steps` steps, on the main rank."""

    def __init__(self, config: Config, run_dir: Path, *, flops_per_token: float, peak_flops: float | None) -> None:
        self.every = config.log.every_steps
        self.config = config
        self.run_dir = run_dir
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.seconds = self.data_seconds = self.save_seconds = 0.0
        self.skipped = 0
        self.last_tokens = 0
        self.total_seconds = 0.0
        self.first_tokens = 0
        self._tensorboard: Any = None
        self._trackers: list[Any] = []
        self._console: Console | None = None
        self._unwritten = ""

    @property
    def tokens_per_second(self) -> float:
        """Mean training speed of this process's whole run, in tokens of the global batch."""
        return (self.last_tokens - self.first_tokens) / self.total_seconds if self.total_seconds else 0.0

    def on_start(self, trainer: Trainer) -> None:
        """Cut the files back to where the run stands and open them."""
        self.last_tokens = self.first_tokens = trainer.progress.tokens
        if not trainer.world.is_main:
            return
        self._unwritten = ""
        truncate_metrics(self.run_dir / run_files.METRICS, trainer.progress.step)
        self._console = Console(self.config.train.steps, trainer.progress.step)
        if self.config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self.run_dir / "tensorboard", purge_step=trainer.progress.step + 1)
        self._trackers = _start_trackers(self.config.log, self.run_dir)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Add this step to the running figures and, when a line is due, write it."""
        record = result.record
        self.seconds += record["step_seconds"]
        self.total_seconds += record["step_seconds"]
        self.data_seconds += record["data_seconds"]
        self.skipped += record["skipped"]
        record["save_seconds"] = self.save_seconds
        step = trainer.progress.step
        due = step % self.every == 0 or step == self.config.train.steps or "val_nelbo" in record
        if result.fault is not None and trainer.world.is_main:
            details = {"reason": result.fault, "rows": result.rows}
            append_event(
                self.run_dir, "skipped", step=step, loss=record["loss"], grad_norm=record["grad_norm"], **details
            )
            logger.warning("step %d leaves out its update, rows %d to %d: %s", step, *result.rows, result.fault)
        if due:
            record["tokens_per_second"] = (trainer.progress.tokens - self.last_tokens) / max(self.seconds, 1e-9)
            record["data_seconds"] = self.data_seconds
            record["memory_gib"] = _peak_memory_gib(trainer.world.device)
            record["skipped"] = self.skipped
            record["time"] = time.time()
            if self.peak_flops:
                per_device = record["tokens_per_second"] * self.flops_per_token / trainer.world.size
                record["mfu"] = per_device / self.peak_flops
            self._reset(trainer.progress.tokens)
            if trainer.world.is_main:
                self._write(record)
        elif self._console is not None:
            self._console.advance(step)

    def on_rollback(self, trainer: Trainer) -> None:
        """Close the files and open them anew, cut back to the checkpoint."""
        self.on_end(trainer)
        self._reset(trainer.progress.tokens)
        self.total_seconds = 0.0
        self.on_start(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Close the files."""
        if self._unwritten:
            self._append("")
        if self._tensorboard is not None:
            self._tensorboard.close()
        for tracker in self._trackers:
            tracker.finish()
        if self._console is not None:
            self._console.close()

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text on TensorBoard, as it is."""
        if self._tensorboard is not None:
            # TensorBoard renders Markdown, in which an indented block is verbatim.
            self._tensorboard.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def _reset(self, tokens: int) -> None:
        self.seconds = self.data_seconds = self.save_seconds = 0.0
        self.skipped = 0
        self.last_tokens = tokens

    def _write(self, record: Record) -> None:
        self._append(json.dumps(without_nan(record)) + "\n")
        scalars = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in ("step", "time")}
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        for tracker in self._trackers:
            tracker.log(scalars, step=record["step"])
        if self._console is not None:
            self._console.line(record)

    def _append(self, line: str) -> None:
        """Write to metrics.jsonl; lines that a full disk does not take follow with the next one that it does."""
        path, was_full = self.run_dir / run_files.METRICS, bool(self._unwritten)
        self._unwritten += line
        try:
            append(path, self._unwritten)
            self._unwritten = ""
        except OSError as error:
            if self.config.checkpoint.on_error != "continue":
                raise
            if not was_full:
                problem = f"{path} cannot be written ({error.strerror})"
                tell(f"megatron-md: {problem}; its lines are kept for later")


class Console:
    """A progress bar with lines above it on a terminal; plain lines elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        self.bar: Any = None
        self.nelbos: list[float] = []
        if sys.stderr.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                console=RichConsole(stderr=True),
            )
            self.task = self.bar.add_task("train", total=total, completed=done)
            self.bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def line(self, record: Record) -> None:
        """Print the record's main figures."""
        figures = [
            f"step {record['step']:>6}",
            f"loss {record['loss']:.4f}",
            f"masked_ce {record.get('masked_ce', math.nan):.4f}",
            f"grad {record['grad_norm']:.3f}",
            f"lr {record['lr']:.2e}",
            f"{record['tokens_per_second']:,.0f} tok/s",
        ]
        text = "  ".join(figures)
        if "mfu" in record:
            text += f"  mfu {record['mfu']:.1%}"
        if record["skipped"]:
            text += f"  SKIPPED {record['skipped']}"
        if "val_nelbo" in record:
            self.nelbos.append(record["val_nelbo"])
            curve = _sparkline(self.nelbos[-CURVE:])
            text += f"  | val_nelbo {record['val_nelbo']:.4f} ± {record['val_nelbo_stderr']:.4f}  {curve}"
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)
            self.advance(record["step"])
        else:
            tell(text)

    def close(self) -> None:
        """Take the bar down."""
        if self.bar is not None:
            self.bar.stop()


def _sparkline(values: Sequence[float]) -> str:
    """A curve of one character a value, between the lowest and the highest of them."""
    known = [value for value in values if math.isfinite(value)]
    lowest, highest = min(known, default=0.0), max(known, default=0.0)
    scale = (len(BARS) - 1) / (highest - lowest or 1.0)
    return "".join(BARS[round((value - lowest) * scale)] if math.isfinite(value) else "?" for value in values)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _start_trackers(log: LogConfig, run_dir: Path) -> list[Any]:
    """The runs at Weights & Biases and Trackio that are asked for: one per run directory, also after a restart."""
    identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    trackers: list[Any] = []
    if log.wandb_project:
        import wandb

        trackers.append(
            wandb.init(project=log.wandb_project, dir=str(run_dir), name=run_dir.name, id=identity, resume="allow")
        )
    if log.trackio_project:
        import trackio

        # Trackio knows a run by its name alone.
        name = f"{run_dir.name}-{identity[:6]}"
        trackers.append(trackio.init(project=log.trackio_project, name=name, resume="allow"))
    return trackers

"""Does this machine, in this layout, still compute what it should? The CI case against its recorded curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_md.config import loader as config_loader
from megatron_md.config.loader import ConfigError
from megatron_md.errors import UserError
from megatron_md.evaluate.compare import relative_difference
from megatron_md.files import replace_file
from megatron_md.json_file import as_record, read_json
from megatron_md.parity.config import ParityConfig, check_parity
from megatron_md.parity.sweep import with_words
from megatron_md.processes import scratch_folder
from megatron_md.sweep.plan import SweepConfig

CURVE_STEPS = 50
RTOL = 1e-5  # of the loss in fp32; 2e-7 were measured between layouts on one machine
GRAD_RTOL = 1e-3  # of the gradient norm, where rounding weighs more: 3e-5 were measured
# What may differ from the record: where and how the same numbers are computed.
FREE = ("parallel.", "megatron.", "train.device", "train.micro_batch_size", "train.deterministic", "train.recompute")


@dataclass(frozen=True)
class _Figures:
    loss: list[float]
    grad_norm: list[float]
    reached_step: int | None
    largest_gap: float
    versions: dict[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Reference(_Figures):
    """A recorded run.

    Attributes:
        config: what was run.
        loss, grad_norm: of the first steps.
        reached_step: where the goal was reached, or None.
        largest_gap: largest train minus validation accuracy.
        versions: of the packages that computed it.
    """

    config: ParityConfig


@dataclass(frozen=True)
class Verdict:
    """How a run compares with the record.

    Attributes:
        loss_difference, grad_difference: largest relative difference of loss and of gradient norm over the first steps.
        first_step: first step where one of them is beyond its tolerance, or None.
        reached_step: where this run reached the goal, or None.
        passed: within the tolerances, and the goal reached like in the record.
    """

    loss_difference: float
    grad_difference: float
    first_step: int | None
    reached_step: int | None
    passed: bool


def default_reference() -> Path:
    """The record that comes with the package: the first run of examples/parity/ci.yaml."""
    return Path(str(resources.files("megatron_md") / "parity" / "reference.json"))


def read_reference(path: Path) -> Reference:
    """A recorded run.

    Raises:
        ConfigError: no such file, or it is no record.
    """
    if not path.exists():
        raise ConfigError([f"{path}: no such file"])
    way_out = "is no record of `megatron-md parity validate --record`"
    try:
        record = read_json(path, way_out)
        config = record.pop("config", None)
        if not isinstance(config, dict):
            raise UserError(f"{path}: holds no config, so it {way_out}")
        figures = as_record(_Figures, record, path, way_out)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    return Reference(config=config_loader.validate(ParityConfig, config, str(path)), **vars(figures))


def layout_config(reference: Reference, words: Sequence[str], world_size: int) -> ParityConfig:
    """The recorded run on another layout or device, with a micro-batch per pipeline stage unless the words say more.

    Raises:
        ConfigError: a word would change what is computed, or the layout cannot be run.
    """
    for word in words:
        if not word.startswith(FREE):
            raise ConfigError([f"{word}: the run is recorded; only {', '.join(FREE)} may be changed"])
    config = with_words(reference.config, words)
    if not any(word.startswith("train.micro_batch_size") for word in words):
        data_size = world_size // config.parallel.replica
        rows = config.train.global_batch_size // max(1, data_size * config.parallel.pipeline)
        config = replace(config, train=replace(config.train, micro_batch_size=max(1, rows)))
    check_parity(config, world_size)
    return config


def train_recorded(config: ParityConfig) -> tuple[dict[str, Any], list[float], list[float]]:
    """Summary, and loss and gradient norm of the first steps, of a run that leaves no files behind."""
    from megatron_md.parity.experiment import run_experiment
    from megatron_md.train.callback import Callback

    class Curve(Callback):
        """Keeps the figures of every step."""

        def __init__(self) -> None:
            self.records: list[tuple[float, float]] = []

        def after_step(self, trainer: Any, result: Any) -> None:
            self.records.append((result.record["loss"], result.record["grad_norm"]))

    curve = Curve()
    with scratch_folder() as folder:
        summary = run_experiment(replace(config, run_dir=str(folder)), (curve,))
    loss, grad_norm = (list(column) for column in zip(*curve.records[:CURVE_STEPS], strict=True))
    return summary, loss, grad_norm


def validate(words: Sequence[str] = (), *, reference: Path | None = None, world_size: int = 1) -> tuple[bool, str]:
    """Train the recorded case in this process's place of the job, and set it against the record.

    Args:
        words: `section.key=value`, layout and device only.
        reference: the record; the package's own if None.
        world_size: processes of the job.

    Returns:
        Whether it passes, and the line that says why.

    Raises:
        UserError: see `read_reference`, `layout_config` and `compare`.
    """
    record = read_reference(reference or default_reference())
    config = layout_config(record, words, world_size)
    summary, loss, grad_norm = train_recorded(config)
    verdict = compare(record, loss, grad_norm, summary["reached_step"])
    return verdict.passed, report(config, world_size, record, verdict)


def compare(reference: Reference, loss: list[float], grad_norm: list[float], reached_step: int | None) -> Verdict:
    """Set a run against the record.

    Raises:
        UserError: the record holds another number of steps.
    """
    steps = {len(loss), len(grad_norm), len(reference.loss), len(reference.grad_norm)}
    if len(steps) > 1 or not loss:
        raise UserError(
            f"the record holds {len(reference.loss)} steps of the curve, the run {len(loss)}: record it anew"
        )
    losses = [relative_difference(*pair) for pair in zip(loss, reference.loss, strict=True)]
    norms = [relative_difference(*pair) for pair in zip(grad_norm, reference.grad_norm, strict=True)]
    beyond = (a > RTOL or b > GRAD_RTOL for a, b in zip(losses, norms, strict=True))
    first = next((step for step, is_beyond in enumerate(beyond, start=1) if is_beyond), None)
    same = (reached_step is None) == (reference.reached_step is None)
    return Verdict(max(losses), max(norms), first, reached_step, first is None and same)


def record_reference(config: ParityConfig, path: Path) -> None:
    """Train the first run of a sweep in this process and write its record."""
    from megatron_md.train.callbacks.metrics import environment

    seeds = config.sweep.seeds or [config.seed]
    arms = list(config.sweep.arms.values()) or [[]]
    config = with_words(replace(config, seed=seeds[0], sweep=SweepConfig()), arms[0])
    check_parity(config)
    summary, loss, grad_norm = train_recorded(config)
    record = {
        "config": asdict(config),
        "loss": loss,
        "grad_norm": grad_norm,
        "reached_step": summary["reached_step"],
        "largest_gap": summary["largest_gap"],
        "versions": environment(1)["versions"],
    }
    replace_file(path, json.dumps(record, indent=1) + "\n")


def report(config: ParityConfig, world_size: int, reference: Reference, verdict: Verdict) -> str:
    """One line: PASS or FAIL, the layout, and the figures behind it."""
    layout = config.parallel
    data = world_size // layout.replica
    context = f" x context {layout.context}" if layout.context > 1 else ""
    where = f"tensor {layout.tensor} x pipeline {layout.pipeline}{context} x data {data} ({config.train.device})"
    curve = (
        f"{CURVE_STEPS} steps' losses within {verdict.loss_difference:.1e} of the record (rtol {RTOL:g}), "
        f"gradient norms within {verdict.grad_difference:.1e} (rtol {GRAD_RTOL:g})"
    )
    if verdict.first_step is not None:
        curve = f"{curve}, too far from step {verdict.first_step} on"
    reached, recorded = (
        "not reached" if step is None else f"at step {step}" for step in (verdict.reached_step, reference.reached_step)
    )
    goal = f"{config.accuracy.stop_at or 0.99:.0%} validation accuracy {reached} (record: {recorded})"
    return f"{'PASS' if verdict.passed else 'FAIL'}  {where}: {curve}; {goal}"

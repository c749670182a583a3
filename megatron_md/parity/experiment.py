"""One k-parity run: the parts of a training run joined around the task, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from megatron_md import parallel, run_files
from megatron_md.config import loader as config_loader
from megatron_md.diffusion.objective import Objective, build_objective
from megatron_md.diffusion.schedule import parse_schedule
from megatron_md.diffusion.scoring import Scorer
from megatron_md.diffusion.theory import schedule_signal_probability
from megatron_md.files import replace_file
from megatron_md.model.build import build_model, wrap_data_parallel
from megatron_md.parallel import World
from megatron_md.parity.accuracy import AccuracyReport, LabelEvaluator
from megatron_md.parity.config import DIRECT, MASK_TOKEN_ID, ParityConfig, training_config
from megatron_md.parity.objective import ReportByRegime
from megatron_md.parity.task import ParityStream, ParityTask
from megatron_md.parity.uniform_attention import UniformAttentionStepper
from megatron_md.plugins import import_plugins
from megatron_md.train.callback import Callback
from megatron_md.train.callbacks.metrics import MetricsWriter, environment, write_json
from megatron_md.train.inference import Inference
from megatron_md.train.optimizer import build_optimizer
from megatron_md.train.resilience import StopRequest
from megatron_md.train.step import Stepper
from megatron_md.train.trainer import Trainer


def run_experiment(
    config: ParityConfig, callbacks: tuple[Callback, ...] = (), *, handle_signals: bool = False
) -> dict[str, Any]:
    """Train one (checked) config in this process's place of the job.

    Args:
        config: the run.
        callbacks: further ones, called first.
        handle_signals: stop after the current step on SIGTERM, SIGINT and SIGUSR1.

    Returns:
        The summary, as in RUN/summary.json: `status` (`finished`, or `stopped` by a signal), `step`, the fields of
        `Learning`, `signal_probability` (at the start), `secret`, `seconds`.
    """
    training = training_config(config)
    import_plugins(training)
    directory, start = Path(config.run_dir), time.time()
    task = ParityTask.of(config)
    objective = build_objective(config.objective, seed=config.seed, mask_token_id=MASK_TOKEN_ID)
    reported = ReportByRegime(objective, task.signal_positions, MASK_TOKEN_ID)
    stop = StopRequest() if handle_signals else None
    with _model(config, reported) as (world, stepper, scorer):
        accuracy = _accuracy_report(config, task, scorer)
        metrics = MetricsWriter(training, directory, flops_per_token=0.0, peak_flops=None)
        stream = ParityStream(task, seed=config.seed)
        trainer = Trainer(training, world, stream, stepper, stepper.optimizer, [accuracy, *callbacks, metrics], stop)
        if world.is_main:
            _open(config, directory, world)
        trainer.fit()
        summary = {
            "status": "stopped" if trainer.stopped_by and not accuracy.is_at_goal else "finished",
            "step": trainer.progress.step,
            **asdict(accuracy.learning),
            "signal_probability": accuracy.signal_probability(0.0),
            "secret": list(task.secret),
            "seconds": time.time() - start,
        }
        if world.is_main:
            write_json(directory / run_files.SUMMARY, summary)
    return summary


def theoretical_signal_probability(config: ParityConfig) -> Callable[[float], float]:
    """P_S of the run's schedule at a progress; NaN under direct supervision, which masks every label."""
    if config.objective.name == DIRECT:
        return lambda progress: float("nan")
    schedule = parse_schedule(config.objective.mask_schedule)
    return lambda progress: schedule_signal_probability(schedule, config.task.k, progress)


@contextmanager
def _model(config: ParityConfig, objective: Objective) -> Iterator[tuple[World, Stepper, Scorer]]:
    """This process's place in the job, and the model to train and to score."""
    if config.denoiser == "uniform_attention":
        torch.set_num_threads(1)
        stand_in = UniformAttentionStepper(config, objective)
        yield World(0, 1, torch.device("cpu"), 0, 1, True), cast(Stepper, stand_in), stand_in
        return
    training = training_config(config)
    with parallel.session(training) as world:
        chunks = build_model(training, world.device, causal=objective.causal, mask_token_id=MASK_TOKEN_ID)
        chunks = wrap_data_parallel(chunks, training)
        stepper = Stepper(training, world, chunks, build_optimizer(training, chunks), objective)
        yield (
            world,
            stepper,
            Inference(training, world, chunks, causal=objective.causal, mask_token_id=MASK_TOKEN_ID),
        )


def _accuracy_report(config: ParityConfig, task: ParityTask, scorer: Scorer) -> AccuracyReport:
    most = config.accuracy.train_samples
    # Of fresh rows, the first ones stand for all.
    train_tokens = task.fresh(0, most) if task.train_tokens is None else task.train_tokens[:most]
    return AccuracyReport(
        LabelEvaluator(train_tokens, scorer),
        LabelEvaluator(task.valid_tokens, scorer),
        every=config.accuracy.every_steps,
        last_step=config.train.steps,
        stop_at=config.accuracy.stop_at,
        signal_probability=theoretical_signal_probability(config),
    )


def _open(config: ParityConfig, directory: Path, world: World) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / run_files.METRICS).unlink(missing_ok=True)
    replace_file(directory / run_files.CONFIG, config_loader.to_yaml(config))
    write_json(directory / run_files.ENVIRONMENT, environment(world.size))
    write_json(directory / run_files.SUMMARY, {"status": "running"})

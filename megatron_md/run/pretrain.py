"""Pretraining from a configuration: builds every part and runs the loop."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_md import config as configuration
from megatron_md import parallel
from megatron_md.checkpoint import rollback
from megatron_md.checkpoint.directory import (
    checkpoint_name,
    config_changes,
    find_checkpoint,
    model_identity,
    named_checkpoints,
)
from megatron_md.checkpoint.hf import original
from megatron_md.checkpoint.manager import CheckpointManager
from megatron_md.checkpoint.saving import Checkpointing
from megatron_md.config import Config
from megatron_md.data.cache import Cache
from megatron_md.data.ledger import LEDGER_NAME, QuarantineLedger
from megatron_md.data.mixture import open_stream
from megatron_md.data.shards import Manifest, load_manifest
from megatron_md.data.stream import validation_rows
from megatron_md.data.survey import unigram_entropy
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.objective import build_objective
from megatron_md.diffusion.scoring import ScoredRows
from megatron_md.errors import EXIT_DONE, EXIT_STOPPED, RunFailedError, UserError
from megatron_md.json_file import read_json
from megatron_md.messages import redacted, tell
from megatron_md.model.build import build_model, wrap_data_parallel
from megatron_md.parallel import World
from megatron_md.plugins import import_plugins
from megatron_md.run import estimate as estimates
from megatron_md.run.lock import only_job
from megatron_md.train.callback import Callback
from megatron_md.train.callbacks.metrics import MetricsWriter, append_event, environment, write_json
from megatron_md.train.callbacks.profile import Profiler
from megatron_md.train.callbacks.quarantine import Quarantine
from megatron_md.train.callbacks.sampling import Sampling
from megatron_md.train.callbacks.validation import Validation
from megatron_md.train.callbacks.watchdog import Watchdog
from megatron_md.train.inference import Inference
from megatron_md.train.logs import logger, open_rank_log
from megatron_md.train.optimizer import build_optimizer
from megatron_md.train.progress import Progress
from megatron_md.train.resilience import StopRequest
from megatron_md.train.step import Stepper
from megatron_md.train.trainer import Trainer

ENTROPY_TOKENS = 1_000_000_000  # a larger corpus is not read through just for its unigram entropy


def pretrain(config: Config) -> int:
    """Train as `config` says, in this process's place in the job.

    Returns:
        The exit code: 0 when all steps are done, 75 when the run was asked to stop and has saved.

    Raises:
        UserError: bad input that only a started run can notice, such as a device that is not there.
    """
    import_plugins(config)
    cache = Cache.of(config.data)
    manifests = [load_manifest(corpus.manifest, cache=cache) for corpus in config.data.corpora()]
    assert manifests, "checked before"
    config = replace(config, model=replace(config.model, vocab=config.model.vocab or manifests[0].vocab_size))
    directory = Path(config.run_dir)
    with (
        parallel.session(config) as world,
        only_job(directory, world),
        Watchdog(config.train.hang_timeout, world, directory) as dog,
    ):
        run = Run.build(config, world, manifests)
        run.trainer.watchdog = dog
        if run.resume():
            run.fit()
        return EXIT_STOPPED if run.trainer.stopped_by else EXIT_DONE


@dataclass
class Run:
    """The parts of a run that the loop does not need to know of each other."""

    config: Config
    world: World
    directory: Path
    manifests: list[Manifest]
    trainer: Trainer
    manager: CheckpointManager
    checkpointing: Checkpointing
    metrics: MetricsWriter
    quarantine: Quarantine
    validation: Validation | None

    @classmethod
    def build(cls, config: Config, world: World, manifests: list[Manifest]) -> Run:
        """Build model, optimizer, data and callbacks; the corpora of `manifests` share a tokenizer."""
        directory, manifest = Path(config.run_dir), manifests[0]
        objective = build_objective(
            config.objective,
            seed=config.seed,
            mask_token_id=manifest.mask_id,
            eos_token_id=manifest.eos_id,
            within_document=config.data.document_attention == "within_document",
        )
        chunks = build_model(config, world.device, causal=objective.causal, mask_token_id=manifest.mask_id)
        chunks = wrap_data_parallel(chunks, config)
        optimizer = build_optimizer(config, chunks)
        stepper = Stepper(config, world, chunks, optimizer, objective)
        stream = open_stream(config.data, manifests, seed=config.seed)
        quarantine = Quarantine(directory, max_quarantined=config.data.max_quarantined)
        manager = CheckpointManager(
            directory,
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            keep_best=config.checkpoint.keep_best,
            resolved_config=configuration.to_yaml(config),
            identity=lambda rows: {
                **stream.state(rows),
                **model_identity(config),
                "tokenizer": manifest.tokenizer_sha256,
                "objective is causal": objective.causal,
            },
            texts={LEDGER_NAME: lambda: quarantine.ledger.text()},
        )
        metrics = _metrics_writer(config, world, directory)
        inference = Inference(config, world, chunks, causal=objective.causal, mask_token_id=manifest.mask_id)
        validation = _validation(config, inference, manifest)
        checkpointing = Checkpointing(manager, config.checkpoint, metrics=metrics)
        # The record is written before the checkpoint, so that a resumed run finds every line up to its step.
        callbacks: list[Callback] = [Profiler(config.train.profile, directory), quarantine, metrics, checkpointing]
        if validation is not None:
            callbacks.insert(0, validation)
        if config.sampling.every_steps:
            callbacks.insert(-1, _sampling(config, inference, metrics))
        stop_request = StopRequest(directory if world.is_main else None)
        trainer = Trainer(config, world, stream, stepper, optimizer, callbacks, stop_request)
        run = cls(config, world, directory, manifests, trainer, manager, checkpointing, metrics, quarantine, validation)
        trainer.roll_back = run.roll_back
        return run

    def resume(self) -> bool:
        """Continue from the newest undamaged checkpoint, if there is one; False if the run is finished already.

        A run without a checkpoint starts from `checkpoint.load`, if that is set.

        Raises:
            UserError: there are checkpoints and `checkpoint.resume` is never, or none of them can be read.
        """
        returned = rollback.finish(self.directory)
        loaded = self._load_newest()
        if loaded is None:
            loaded = self._start_from_another()
        if loaded is None:
            return True
        checkpoint = loaded[0]
        self._continue_from(*loaded, returned)
        finished = self.trainer.progress.step >= self.config.train.steps
        if self.world.is_main:
            state = "finished, nothing to do" if finished else "continues"
            tell(f"{self.directory}: {state} at step {self.trainer.progress.step}")
            if finished:
                self._close_late()
            else:
                changed = config_changes(checkpoint, self.manager.resolved_config)
                append_event(self.directory, "loaded", path=str(checkpoint), changed=changed)
        return not finished

    def _load_newest(self) -> tuple[Path, Progress] | None:
        if self.config.checkpoint.resume == "never" and named_checkpoints(self.directory / "checkpoints"):
            raise UserError(
                f"{self.directory} holds checkpoints and checkpoint.resume is never: "
                "choose another run_dir, remove it, or set checkpoint.resume=auto"
            )
        return self.manager.load_newest(self.trainer.stepper.chunks, self.trainer.optimizer)

    def _start_from_another(self) -> tuple[Path, Progress] | None:
        """Take the weights of `checkpoint.load`, or all of it."""
        keys = self.config.checkpoint
        if keys.load is None:
            return None
        checkpoint, stepper, optimizer = find_checkpoint(Path(keys.load)), self.trainer.stepper, self.trainer.optimizer
        if self.world.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            original.hand_on(checkpoint.parent.parent, self.directory)
        if keys.load_only is None:
            return checkpoint, self.manager.load(stepper.chunks, optimizer, checkpoint)
        self.manager.load_model_only(stepper.chunks, optimizer, checkpoint)
        if self.world.is_main:
            tell(f"{self.directory}: starts with the weights of {checkpoint}")
            append_event(self.directory, "weights_loaded", path=str(checkpoint))
        return None

    def _continue_from(self, checkpoint: Path, progress: Progress, returned: rollback.Rollback | None) -> None:
        self.trainer.progress = progress if returned is None else returned.applied(progress)
        self.quarantine.ledger = QuarantineLedger.read(checkpoint / LEDGER_NAME)
        self.trainer.stream.quarantine(self.quarantine.ledger)

    def roll_back(self) -> None:
        """Return to the newest checkpoint from before the bad numbers; `rollback` says what is left out from here on.

        Raises:
            BadNumbersError: on all ranks, if there is none, or `train.max_rollbacks` is reached.
        """
        self.checkpointing.settle(self.trainer)
        left, poisoned = self.trainer.progress, self.trainer.poisoned
        most = self.config.train.max_rollbacks
        returned = rollback.agreed(self.directory, left, max_rollbacks=most, poisoned=poisoned)
        self.trainer.poisoned = None
        checkpoint = self.directory / "checkpoints" / checkpoint_name(returned.step)
        progress = self.manager.load(self.trainer.stepper.chunks, self.trainer.optimizer, checkpoint)
        self._continue_from(checkpoint, progress, returned)
        if self.world.is_main:
            rows = [list(jump) for jump in returned.jumps if jump not in left.jumps]
            without = "".join(f", from now on without the rows {first} to {stop - 1}" for first, stop in rows)
            append_event(
                self.directory,
                "rolled back",
                step=returned.step,
                left_step=left.step,
                rows=rows[0] if rows else None,
                reason=returned.reason,
            )
            tell(f"megatron-md: {returned.reason}: back to step {returned.step}{without}")

    def fit(self) -> None:
        """Run the loop, and keep RUN's files true about how it went."""
        start = time.time()
        open_rank_log(self.directory, self.world)
        if self.world.is_main:
            self._open()
        if self.trainer.watchdog is not None:
            # Whoever fails first says so in the run's files, be it the main rank or not.
            self.trainer.watchdog.on_failure = lambda text: self._close_failed(start, text)
        try:
            self.trainer.fit()
        except Exception as error:
            logger.exception("the run failed at step %d", self.trainer.progress.step)
            if self.world.is_main and (self.world.size == 1 or isinstance(error, RunFailedError)):
                self._close_failed(start, f"{type(error).__name__}: {error}")
            raise
        if self.world.is_main:
            self._close("stopped" if self.trainer.stopped_by else "finished", start)

    def _close_failed(self, start: float, text: str) -> None:
        """Record what the run failed of; a disk that is full must not hide it."""
        try:
            self._close("failed", start, error=text)
        except OSError as error:
            tell(f"megatron-md: {self.directory}: the failure is not recorded there ({error})")

    def _close_late(self) -> None:
        """Say that the run is finished where it was cut off between its last save and its summary."""
        path = self.directory / "summary.json"
        try:
            summary = read_json(path, "it is written anew")
        except ValueError:  # gone, or broken by hand
            summary = {}
        if summary.get("status") != "finished":
            progress = self.trainer.progress
            write_json(path, {**summary, "status": "finished", "step": progress.step, "tokens": progress.tokens})
            append_event(self.directory, "finished", step=progress.step)

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "config.yaml").write_text(configuration.to_yaml(self.config), encoding="utf-8")
        write_json(self.directory / "env.json", environment(self.world.size))
        write_json(self.directory / "summary.json", {"status": "running"})
        if self.config.data.tokenizer is not None:
            # A run carries its tokenizer: it can be moved, evaluated and converted without the corpus.
            Tokenizer(self.config.data.tokenizer).save(self.directory / "tokenizer.model")
        step, restart = self.trainer.progress.step, parallel.restarts()
        append_event(self.directory, "started", step=step, world_size=self.world.size, restart=restart)
        if restart:
            tell(f"megatron-md: restart {restart}, from step {step}")

    def _close(self, status: str, start: float, **details: Any) -> None:
        progress = self.trainer.progress
        summary: dict[str, Any] = {
            "status": status,
            "step": progress.step,
            "tokens": progress.tokens,
            "parameters": _parameters(self.config),
            "tokens_per_second": self.metrics.tokens_per_second,
            "seconds": time.time() - start,
            **details,
        }
        if self.trainer.stopped_by:
            summary["stopped_by"] = self.trainer.stopped_by
        if self.validation is not None:
            summary.update(self.validation.newest)
        if status == "finished" and len(self.manifests) == 1 and self.manifests[0].tokens <= ENTROPY_TOKENS:
            try:
                summary["unigram_entropy"] = unigram_entropy(self.manifests[0])
            except ValueError as error:
                # Damage that the run has tolerated must not fail it in the end.
                logger.warning("no unigram entropy: %s", error)
        write_json(self.directory / "summary.json", redacted(summary))
        if self.trainer.stopped_by:
            details["signal"] = self.trainer.stopped_by
        append_event(self.directory, status, step=progress.step, **details)
        if self.trainer.stopped_by:
            tell(f"stopped by {self.trainer.stopped_by} at step {progress.step}, saved: the same command resumes")


def _parameters(config: Config) -> int:
    assert config.model.vocab is not None
    return estimates.parameter_count(
        config.model, config.model.vocab, config.model.max_length or config.data.seq_length
    )


def _metrics_writer(config: Config, world: World, directory: Path) -> MetricsWriter:
    assert config.model.vocab is not None
    return MetricsWriter(
        config,
        directory,
        flops_per_token=estimates.training_flops_per_token(config, config.model.vocab),
        peak_flops=parallel.peak_flops(world.device, config.train.precision),
    )


def _sampling(config: Config, denoiser: Inference, metrics: MetricsWriter) -> Sampling:
    assert config.data.tokenizer is not None, "checked before"
    return Sampling(config, denoiser, Tokenizer(config.data.tokenizer), metrics)


def _validation(config: Config, scorer: Inference, manifest: Manifest) -> Validation | None:
    if not config.validation.sequences or config.data.valid is None:
        return None
    valid = load_manifest(config.data.valid, cache=Cache.of(config.data))
    rows = validation_rows(valid, config.data.seq_length, config.validation.sequences)
    scored = ScoredRows(rows.tokens_BL, scorer.shift.scorable(rows.is_maskable_BL), cu_seqlens=rows.cu_seqlens)
    return Validation(config, scorer, scored, mask_token_id=manifest.mask_id)

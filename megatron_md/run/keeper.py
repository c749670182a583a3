"""What a run's directory says of it as a whole: config.yaml, env.json, the tokenizer, summary.json."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_md import parallel, run_files
from megatron_md.config import ResolvedConfig, to_yaml
from megatron_md.data.shards import Manifest
from megatron_md.data.survey import unigram_entropy
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.errors import RunFailedError
from megatron_md.json_file import read_json
from megatron_md.messages import redacted, tell
from megatron_md.parallel import World
from megatron_md.run import estimate
from megatron_md.run.epochs import passes
from megatron_md.train.callbacks.metrics import MetricsWriter, append_event, environment, write_json
from megatron_md.train.callbacks.validation import Validation
from megatron_md.train.callbacks.watchdog import Watchdog
from megatron_md.train.logs import logger, open_rank_log
from megatron_md.train.records import lowest, read_lines
from megatron_md.train.trainer import Trainer

ENTROPY_TOKENS = 1_000_000_000  # a larger corpus is not read through just for its unigram entropy


@dataclass(frozen=True)
class Keeper:
    """Keeps RUN's files true about how the run goes."""

    config: ResolvedConfig
    world: World
    manifests: list[Manifest]
    metrics: MetricsWriter
    validation: Validation | None

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return Path(self.config.run_dir)

    @contextmanager
    def record(self, trainer: Trainer, dog: Watchdog) -> Iterator[None]:
        """Around the loop: say how the run starts and how it ends, whatever ends it."""
        start = time.time()
        open_rank_log(self.directory, self.world)
        if self.world.is_main:
            self._open(trainer)
        # Whoever fails first says so in the run's files, be it the main rank or not.
        dog.on_failure = lambda text: self._close_failed(trainer, start, text)
        try:
            yield
        except Exception as error:
            logger.exception("the run failed at step %d", trainer.progress.step)
            if self.world.is_main and (self.world.size == 1 or isinstance(error, RunFailedError)):
                self._close_failed(trainer, start, f"{type(error).__name__}: {error}")
            raise
        if self.world.is_main:
            self._close(trainer, "stopped" if trainer.stopped_by else "finished", start)

    def close_late(self, trainer: Trainer) -> None:
        """Say that the run is finished where it was cut off between its last save and its summary."""
        path, progress = self.directory / run_files.SUMMARY, trainer.progress
        try:
            summary = read_json(path, "it is written anew")
        except ValueError:  # gone, or broken by hand
            summary = {}
        if summary.get("status") != "finished":
            write_json(path, {**summary, "status": "finished", "step": progress.step, "tokens": progress.tokens})
            append_event(self.directory, "finished", step=progress.step)

    def _open(self, trainer: Trainer) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / run_files.CONFIG).write_text(to_yaml(self.config), encoding="utf-8")
        write_json(self.directory / run_files.ENVIRONMENT, environment(self.world.size))
        made = passes(self.config, trainer.stream)
        corpora = redacted([asdict(one) for one in made])
        write_json(self.directory / run_files.SUMMARY, {"status": "running", "corpora": corpora})
        if self.config.data.tokenizer is not None:
            # A run carries its tokenizer: it can be moved, evaluated and converted without the corpus.
            Tokenizer(self.config.data.tokenizer).save(self.directory / run_files.TOKENIZER)
        step, restart = trainer.progress.step, parallel.restarts()
        details = {"world_size": self.world.size, "restart": restart, "corpora": corpora}
        append_event(self.directory, "started", step=step, **details)
        if restart:
            tell(f"megatron-md: restart {restart}, from step {step}")
        for one in made:
            tell(f"{one.corpus}: {one}")

    def _close_failed(self, trainer: Trainer, start: float, text: str) -> None:
        """Record what the run failed of; a disk that is full must not hide it."""
        try:
            self._close(trainer, "failed", start, error=text)
        except OSError as error:
            tell(f"megatron-md: {self.directory}: the failure is not recorded there ({error})")

    def _best(self) -> dict[str, Any]:
        """The lowest validation NELBO of the whole run, however often it was resumed."""
        records = [line.record for line in read_lines(self.directory / run_files.METRICS) if line.record is not None]
        best = lowest(records)
        return {} if best is None else {"best_val_nelbo": best["val_nelbo"], "best_val_step": best["step"]}

    def _close(self, trainer: Trainer, status: str, start: float, **details: Any) -> None:
        step, stopped_by = trainer.progress.step, trainer.stopped_by
        summary: dict[str, Any] = {
            "status": status,
            "step": step,
            "tokens": trainer.progress.tokens,
            "parameters": estimate.parameter_count(self.config.model),
            "trained_parameters": estimate.trained_count(self.config),
            "tokens_per_second": self.metrics.tokens_per_second,
            "seconds": time.time() - start,
            "corpora": [asdict(one) for one in passes(self.config, trainer.stream)],
            **details,
            **({"stopped_by": stopped_by} if stopped_by else {}),
            **(self.validation.newest if self.validation is not None else {}),
            **self._best(),
        }
        if status == "finished" and len(self.manifests) == 1 and self.manifests[0].tokens <= ENTROPY_TOKENS:
            try:
                corpus = self.config.data.corpora()[0]
                summary["unigram_entropy"] = unigram_entropy(self.manifests[0], corpus.max_tokens)
            except ValueError as error:
                # Damage that the run has tolerated must not fail it in the end.
                logger.warning("no unigram entropy: %s", error)
        write_json(self.directory / run_files.SUMMARY, redacted(summary))
        append_event(self.directory, status, step=step, **details, **({"signal": stopped_by} if stopped_by else {}))
        if stopped_by:
            tell(f"stopped by {stopped_by} at step {step}, saved: the same command resumes")

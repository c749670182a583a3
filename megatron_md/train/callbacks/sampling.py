"""Samples during training: RUN/samples.jsonl tells what the model writes, every `sampling.every_steps` steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from megatron_md import run_files
from megatron_md.config import Config
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.files import append
from megatron_md.messages import tell
from megatron_md.train.callback import Callback, StepResult
from megatron_md.train.callbacks.metrics import MetricsWriter, truncate_metrics
from megatron_md.train.filling import fill
from megatron_md.train.inference import Inference
from megatron_md.train.sample_requests import sample_requests
from megatron_md.train.trainer import Trainer


class Sampling(Callback):
    """Continues the prompts every `sampling.every_steps` steps and after the last one; training does not notice."""

    def __init__(
        self,
        config: Config,
        denoiser: Inference,
        tokenizer: Tokenizer,
        metrics: MetricsWriter,
        alive: Callable[[int], None],
    ) -> None:
        """Raises what `sample_requests` does; `alive` hears the run's step at every step of a sampler."""
        self.every, self.last_step = config.sampling.every_steps, config.train.steps
        self.path = Path(config.run_dir) / run_files.SAMPLES
        self.denoiser, self.tokenizer, self.metrics, self.alive = denoiser, tokenizer, metrics, alive
        self.may_be_lost = config.checkpoint.on_error == "continue"
        self.requests = sample_requests(config, tokenizer)

    def on_start(self, trainer: Trainer) -> None:
        """Cut the file back to where the run stands."""
        if trainer.world.is_main:
            truncate_metrics(self.path, trainer.progress.step)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Sample where it is due; every rank takes part, the main one writes."""
        step = trainer.progress.step
        if step % self.every and step != self.last_step:
            return

        for request in self.requests:
            start = time.perf_counter()
            sample = fill(
                self.denoiser,
                [request.tokens],
                request.config,
                mask_token_id=self.tokenizer.mask_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                on_step=lambda _: self.alive(step),
            )
            if trainer.world.is_main:
                text = self.tokenizer.decode(sample.tokens_BL[0, -request.config.length :].tolist())
                line = {
                    "step": step,
                    "prompt": request.prompt,
                    "text": text,
                    "seed": request.config.seed,
                    "forward_passes": sample.forward_passes,
                    "seconds": time.perf_counter() - start,
                }
                self._write(json.dumps(line) + "\n")
                self.metrics.text(f"sample/{request.prompt}", request.prompt + text, step)

    def _write(self, line: str) -> None:
        try:
            append(self.path, line)
        except OSError as error:
            if not self.may_be_lost:
                raise
            tell(f"megatron-md: {self.path} cannot be written ({error.strerror}): a sample is lost")

"""Samples during training: RUN/samples.jsonl tells what the model writes, every `sampling.every_steps` steps."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_md.config import Config
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.sampler import SamplerConfig, SamplerStep, check_fits
from megatron_md.train.callback import Callback, Record
from megatron_md.train.denoiser import StepperDenoiser, fill
from megatron_md.train.metrics import MetricsWriter, truncate_metrics
from megatron_md.train.trainer import Trainer


@dataclass(frozen=True)
class SampleRequest:
    """A prompt with its tokens, and how to continue it."""

    prompt: str
    tokens: list[int]
    config: SamplerConfig


def sample_requests(config: Config, tokenizer: Tokenizer) -> list[SampleRequest]:
    """The prompts of `sampling`, checked.

    Under sequence parallelism a canvas must be a multiple of `parallel.tensor`: the length is rounded up to that.

    Raises:
        ValueError: a prompt does not fit into the context, or the sampler's keys contradict each other.
    """
    keys = config.sampling
    multiple = config.parallel.tensor if config.parallel.sequence_parallel else 1
    requests = []
    for prompt in keys.prompts:
        try:
            tokens = tokenizer.encode(prompt).tolist()
            if config.objective.right_shift and not tokens:
                tokens = [tokenizer.eos_token_id]  # nothing predicts a row's first token
            length = keys.length + -(len(tokens) + keys.length) % multiple
            check_fits(len(tokens), length, config.model.max_length or config.data.seq_length)
            sampler = SamplerConfig(
                length=length,
                steps=keys.steps,
                block=keys.block,
                strategy=keys.strategy,
                temperature=keys.temperature,
                seed=keys.seed,
            )
        except ValueError as error:
            raise ValueError(f"sampling, prompt {prompt!r}: {error}") from None
        requests.append(SampleRequest(prompt, tokens, sampler))
    return requests


class Sampling(Callback):
    """Continues the prompts every `sampling.every_steps` steps and after the last one; training does not notice."""

    def __init__(self, config: Config, denoiser: StepperDenoiser, tokenizer: Tokenizer, metrics: MetricsWriter) -> None:
        """Raises what `sample_requests` does."""
        self.every, self.last_step = config.sampling.every_steps, config.train.steps
        self.path = Path(config.run_dir) / "samples.jsonl"
        self.denoiser, self.tokenizer, self.metrics = denoiser, tokenizer, metrics
        self.requests = sample_requests(config, tokenizer)

    def on_start(self, trainer: Trainer) -> None:
        """Cut the file back to where the run stands."""
        if trainer.world.is_main:
            truncate_metrics(self.path, trainer.progress.step)

    def after_step(self, trainer: Trainer, record: Record) -> None:
        """Sample where it is due; every rank takes part, the main one writes."""
        step = trainer.progress.step
        if step % self.every and step != self.last_step:
            return

        def alive(_: SamplerStep) -> None:
            if trainer.watchdog is not None:
                trainer.watchdog.alive(step)

        for request in self.requests:
            start = time.perf_counter()
            result = fill(
                self.denoiser,
                [request.tokens],
                request.config,
                mask_token_id=self.tokenizer.mask_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                on_step=alive,
            )
            if trainer.world.is_main:
                text = self.tokenizer.decode(result.tokens_BL[0, -request.config.length :].tolist())
                line = {
                    "step": step,
                    "prompt": request.prompt,
                    "text": text,
                    "seed": request.config.seed,
                    "forward_passes": result.forward_passes,
                    "seconds": time.perf_counter() - start,
                }
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                self.metrics.text(f"sample/{request.prompt}", request.prompt + text, step)

"""Texts of a trained run: prompts are encoded, checked, batched by length, denoised, and printed in their order."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from megatron_md import parallel
from megatron_md.commands.generate import sampler_config
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.sampler import OnStep, Sample, SamplerStep, infill
from megatron_md.diffusion.sampler_config import SamplerConfig, check_fits
from megatron_md.errors import UserError
from megatron_md.evaluate.canvas import LiveCanvas, can_stream
from megatron_md.evaluate.generation import shared
from megatron_md.evaluate.load import is_causal, load_model
from megatron_md.evaluate.prompts import Prompt, batches, canvas_of, typed_prompts
from megatron_md.evaluate.trace import Recorder, trace_page
from megatron_md.files import replace_file
from megatron_md.messages import printable, tell
from megatron_md.parallel import World
from megatron_md.plugins import import_plugins
from megatron_md.run.saved import SavedRun, open_asked
from megatron_md.train.inference import fill

TYPING_SECONDS = 7 * 86400.0  # how long other ranks wait for a line


@dataclass(frozen=True)
class Request:
    """A prompt that was checked.

    Attributes:
        prompt: as it was written.
        tokens: of the prompt; with `--infill` the canvas, open positions included.
        config: how to continue it.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    config: SamplerConfig


@dataclass(frozen=True)
class Text:
    """What was written; a line of `--output`.

    Attributes:
        prompt: as it was given.
        text: what follows the prompt; with `--infill` the whole text.
        seed: of its draws.
        tokens: ids of `text`.
        forward_passes: of its batch.
        steps: of its batch.
        seconds: for its batch.
    """

    prompt: str
    text: str
    seed: int
    tokens: list[int]
    forward_passes: int
    steps: int
    seconds: float


class Requests:
    """Turns prompts into requests, as the options and the run say."""

    def __init__(self, args: argparse.Namespace, saved: SavedRun, tokenizer: Tokenizer) -> None:
        """Check the options against the run.

        Raises:
            UserError: they do not fit each other or the run.
        """
        self._args, self._tokenizer = args, tokenizer
        self._right_shift = saved.config.objective.right_shift
        self._context = saved.config.model.max_length
        causal = is_causal(saved, mask_token_id=tokenizer.mask_token_id)
        if causal:
            options = {
                "infill": args.infill,
                "steps": args.steps,
                "block": args.block,
                "strategy": args.strategy,
                "guidance": args.guidance,
            }
            given = next((name for name, value in options.items() if value), None)
            if given:
                raise UserError(
                    f"{saved.checkpoint}: a causal model writes one token after the other; leave --{given} out"
                )
        self._config = sampler_config(
            args, self._context if args.infill else args.length, None if args.infill else args.steps
        )

    def of(self, prompt: Prompt) -> Request:
        """The request for a prompt.

        Raises:
            UserError: it does not fit into the context or has nothing to fill in; the message says which prompt.
        """
        try:
            return self._filled_in(prompt) if self._args.infill else self._continued(prompt)
        except ValueError as error:
            raise UserError(f"{prompt.where}: {error}") from error

    def _continued(self, prompt: Prompt) -> Request:
        tokens = self._tokenizer.encode(prompt.text).tolist()
        if self._right_shift and not tokens:
            tokens = [self._tokenizer.eos_token_id]  # nothing predicts a row's first token
        elif self._config.guidance and not tokens:
            raise UserError("--guidance needs a prompt to do without; give one or leave it out")
        check_fits(len(tokens), self._config.length, self._context)
        return Request(prompt, tuple(tokens), self._config)

    def _filled_in(self, prompt: Prompt) -> Request:
        mask = self._tokenizer.mask_token_id
        canvas = canvas_of(prompt.text, self._tokenizer)
        if len(canvas) > self._context:
            raise UserError(
                f"its {len(canvas)} tokens exceed the model's {self._context} positions; shorten it or its placeholders"
            )
        if self._right_shift and canvas[0] == mask:
            raise UserError("this model predicts a token from those before it; let the prompt begin with a text")
        if self._config.guidance and set(canvas) == {mask}:
            raise UserError("--guidance needs given text to do without; give some or leave it out")
        steps = self._args.steps
        if steps is None and self._config.strategy != "first_hitting":
            steps = canvas.count(mask)
        return Request(prompt, tuple(canvas), sampler_config(self._args, len(canvas), steps))


def write_texts(args: argparse.Namespace, prompts: list[Prompt] | None) -> None:
    """Generate, print, and write `--output` and `--save-trace`; prompts are typed where None are given.

    Raises:
        UserError: bad input, with the way out.
    """
    saved = open_asked(args.run_path, args)
    if args.trust:
        import_plugins(saved.config)  # they may register strategies
    tokenizer = Tokenizer(saved.tokenizer)
    requests = Requests(args, saved, tokenizer)
    # All that can be wrong is known before the model is loaded.
    asked = None if prompts is None else [requests.of(prompt) for prompt in prompts]
    config = saved.config
    if asked is None:
        config = replace(config, parallel=replace(config.parallel, timeout_seconds=TYPING_SECONDS))
    with parallel.session(config) as world:
        writer = Writer(args, saved, world, tokenizer)
        if asked is not None:
            writer.write(asked)
            return
        for prompt in typed_prompts(world):
            try:
                request = requests.of(prompt)
            except ValueError as error:
                if world.is_main:
                    tell(error)
                continue
            writer.write([request])


class Writer:
    """A loaded run that writes texts."""

    def __init__(self, args: argparse.Namespace, saved: SavedRun, world: World, tokenizer: Tokenizer) -> None:
        self._args, self._saved, self._world, self._tokenizer = args, saved, world, tokenizer
        self._denoiser = load_model(saved, world, tokenizer)
        self._streams = world.is_main and world.data_size == 1 and not args.no_stream and can_stream()
        self._texts: list[Text] = []

    def write(self, requests: list[Request]) -> None:
        """Generate the samples of each request, print them, and add them to `--output`; every rank calls this."""
        args, world = self._args, self._world
        samples = range(args.samples)
        groups = batches([(len(request.tokens), request.config) for request in requests], args.batch_size)
        jobs = [(group, sample) for group in groups for sample in samples]
        alone = len(requests) == 1
        at_once = alone and world.data_size == 1
        with self._progress(len(jobs), shown=not at_once) as advance:

            def work(job: tuple[list[int], int]) -> list[Text]:
                group, sample = job
                texts = self._batch([requests[place] for place in group], sample, alone=alone)
                advance()
                return texts

            found = shared(world, jobs, work)
        texts = {
            (place, sample): text
            for (group, sample), batch in zip(jobs, found, strict=True)
            for place, text in zip(group, batch, strict=True)
        }
        ordered = [texts[place, sample] for place in range(len(requests)) for sample in samples]
        if world.is_main:
            for text in ordered if not at_once else []:
                self._print(text)
            self._texts += ordered
            if args.output:
                replace_file(args.output, "".join(json.dumps(asdict(text)) + "\n" for text in self._texts))

    @contextmanager
    def _progress(self, jobs: int, *, shown: bool) -> Iterator[Callable[[], None]]:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        hidden = not (shown and jobs > 1 and self._world.is_main and console.is_terminal)
        with Progress(console=console, disable=hidden, transient=True) as bar:
            task = bar.add_task("batches", total=jobs)
            yield lambda: bar.advance(task)

    def _batch(self, requests: list[Request], sample: int, *, alone: bool) -> list[Text]:
        """Texts of requests that go together; a lone one is shown while it is written, and printed."""
        config = replace(requests[0].config, seed=requests[0].config.seed + sample)
        recorder = Recorder(self._tokenizer.mask_token_id)
        start = time.perf_counter()
        if alone and self._streams:
            with LiveCanvas(self._decode, self._tokenizer.mask_token_id) as live:
                result = self._denoise(requests, config, _both(live.on_step, recorder.on_step))
        else:
            result = self._denoise(requests, config, recorder.on_step if self._args.save_trace else None)
        seconds = time.perf_counter() - start
        rows = [row[-config.length :] for row in result.tokens_BL.tolist()]
        texts = [
            Text(
                prompt=request.prompt.text,
                text=self._tokenizer.decode(tokens),
                seed=config.seed,
                tokens=tokens,
                forward_passes=result.forward_passes,
                steps=result.steps,
                seconds=seconds,
            )
            for request, tokens in zip(requests, rows, strict=True)
        ]
        if alone and self._world.is_main:
            if self._world.data_size == 1:
                self._print(texts[0], streamed=self._streams)
            if self._args.save_trace:
                self._save_trace(recorder, texts[0], config)
        return texts

    def _denoise(self, requests: list[Request], config: SamplerConfig, on_step: OnStep | None) -> Sample:
        mask, eos = self._tokenizer.mask_token_id, self._tokenizer.eos_token_id
        rows = [request.tokens for request in requests]
        seeds = [config.seed] * len(rows)  # a text does not depend on what it is batched with
        if not self._args.infill:
            return fill(
                self._denoiser, rows, config, mask_token_id=mask, eos_token_id=eos, on_step=on_step, seeds=seeds
            )
        canvas_BL = torch.tensor(rows, dtype=torch.int64, device=self._denoiser.device)
        return infill(
            self._denoiser, canvas_BL, config, mask_token_id=mask, eos_token_id=eos, on_step=on_step, seeds=seeds
        )

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, show_special=True)

    def _print(self, text: Text, *, streamed: bool = False) -> None:
        whole = text.text if self._args.infill else text.prompt + text.text
        if not streamed:
            sys.stdout.write((printable(whole, multiline=True) if sys.stdout.isatty() else whole) + "\n")
            sys.stdout.flush()
        tell(
            f"[{len(text.tokens)} tokens, {text.forward_passes} forward passes, {text.seconds:.1f} s, "
            f"step {self._saved.step} of {self._args.run_path}]"
        )

    def _save_trace(self, recorder: Recorder, text: Text, config: SamplerConfig) -> None:
        facts = {
            "run": f"{self._args.run_path}, step {self._saved.step}",
            "prompt": printable(text.prompt, multiline=True),
            "strategy": f"{config.strategy}, temperature {config.temperature:g}, seed {config.seed}",
            "steps": f"{text.steps}, {text.forward_passes} forward passes",
        }
        title = f"{printable(text.prompt)[:60]} – {text.steps} denoising steps"
        replace_file(self._args.save_trace, trace_page(recorder, self._decode, title=title, facts=facts))


def _both(first: OnStep, second: OnStep) -> OnStep:
    def on_step(step: SamplerStep) -> None:
        first(step)
        second(step)

    return on_step

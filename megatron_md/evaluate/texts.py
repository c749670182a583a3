"""Texts of a trained run: prompts are encoded, checked, batched by length, denoised, and given in their order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_md import parallel
from megatron_md.data.entries import Message
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.sampler import OnStep, Sample, SamplerStep, infill
from megatron_md.diffusion.sampler_config import SamplerConfig, check_fits
from megatron_md.errors import UserError
from megatron_md.evaluate.canvas import LiveCanvas
from megatron_md.evaluate.dialogue import Speech, template_of
from megatron_md.evaluate.load import is_causal, load_model
from megatron_md.evaluate.prompts import Prompt, batches, canvas_of, typed_prompts
from megatron_md.evaluate.trace import Recorder, trace_page
from megatron_md.files import replace_file
from megatron_md.messages import printable, progress, tell
from megatron_md.parallel import World, shared
from megatron_md.plugins import import_plugins
from megatron_md.run.saved import SavedRun
from megatron_md.train.decoder import Decoder
from megatron_md.train.filling import check_block_model, fill

TYPING_SECONDS = 7 * 86400.0  # how long other ranks wait for a line


@dataclass(frozen=True)
class TextOptions:
    """What is written.

    Attributes:
        length: tokens after a prompt; an infilled one says itself what is open.
        infill: fill in the prompts' placeholders instead of continuing them.
        sampler: the other keys of `SamplerConfig` that were given.
        samples: texts for each prompt; their seeds follow the sampler's.
        batch_size: prompts of equal length that go together.
        output: file for the texts as JSON lines.
        save_trace: file for a page that replays the steps of the one text.
        stream: show a lone prompt's canvas on the terminal while it is filled.
        chat: prompts are messages of a user's, to be answered.
        template: of the chat, as `ChatTemplate.of` takes it; the run's own if None.
        system: system text of the chat.
    """

    length: int
    infill: bool = False
    sampler: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 1
    batch_size: int = 8
    output: Path | None = None
    save_trace: Path | None = None
    stream: bool = False
    chat: bool = False
    template: str | None = None
    system: str | None = None


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
        text: what follows the prompt, of a chat up to the answer's end; with `--infill` the whole text.
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


OnText = Callable[[Text, bool], None]


def write_texts(
    saved: SavedRun,
    prompts: Sequence[Prompt] | None,
    options: TextOptions,
    on_text: OnText = lambda text, streamed: None,
) -> list[Text]:
    """Generate, and write the files that are asked for; every rank calls this and gets the same texts.

    Args:
        saved: the run, opened for this job.
        prompts: what to continue or to fill in; typed where None are given.
        options: how.
        on_text: given each text in order on the main rank, as early as there is one, and whether it was streamed.

    Raises:
        UserError: bad input, with the way out.
    """
    if saved.trust:
        import_plugins(saved.config)  # they may register strategies
    tokenizer = Tokenizer(saved.tokenizer)
    requests = Requests(saved, tokenizer, options)
    # All that can be wrong is known before the model is loaded.
    asked = None if prompts is None else [requests.of(prompt) for prompt in prompts]
    config = saved.config
    if asked is None:
        config = replace(config, parallel=replace(config.parallel, timeout_seconds=TYPING_SECONDS))
    with parallel.session(config) as world:
        writer = Writer(saved, world, tokenizer, options, on_text, requests.speech)
        if asked is not None:
            writer.write(asked)
            return writer.texts
        for prompt in typed_prompts(world):
            try:
                request = requests.of(prompt)
            except UserError as error:
                if world.is_main:
                    tell(error)
                continue
            writer.write([request])
        return writer.texts


def refuse_of_causal(saved: SavedRun, keys: Mapping[str, Any]) -> None:
    """Refuse keys of the sampler that mean nothing to a causal run.

    Raises:
        UserError: one was given.
    """
    for name in ("infill", "steps", "block", "strategy", "guidance", "cache"):
        if keys.get(name):
            raise UserError(f"{saved.checkpoint}: a causal model writes one token after the other; leave --{name} out")


class Requests:
    """Turns prompts into requests, as the options and the run say.

    Attributes:
        speech: how the run is spoken to, in a chat.
    """

    def __init__(self, saved: SavedRun, tokenizer: Tokenizer, options: TextOptions) -> None:
        """Check the options against the run.

        Raises:
            UserError: they do not fit each other or the run.
        """
        self._options, self._tokenizer = options, tokenizer
        self._right_shift = saved.config.objective.right_shift
        self._context = saved.config.model.max_length
        if is_causal(saved, mask_token_id=tokenizer.mask_token_id):
            refuse_of_causal(saved, {"infill": options.infill, **options.sampler})
        self._block_size = saved.config.objective.final_block_size
        if self._block_size is not None and options.infill:
            raise UserError("--infill: a block model sees nothing behind a block; it continues texts only")
        self.speech = Speech(template_of(saved, tokenizer, options.template), tokenizer) if options.chat else None
        self._config = self._sampler(self._context, steps=None) if options.infill else self._sampler(options.length)

    def of(self, prompt: Prompt) -> Request:
        """The request for a prompt.

        Raises:
            UserError: it does not fit into the context or has nothing to fill in; the message says which prompt.
        """
        try:
            return self._filled_in(prompt) if self._options.infill else self._continued(prompt)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from error

    def _sampler(self, length: int, **keys: Any) -> SamplerConfig:
        return SamplerConfig(**{**self._options.sampler, "length": length, **keys})

    def _continued(self, prompt: Prompt) -> Request:
        tokens = self._tokenizer.encode(prompt.text).tolist() if self.speech is None else self._asked(prompt)
        if self._right_shift and not tokens:
            tokens = [self._tokenizer.eos_token_id]  # nothing predicts a row's first token
        elif self._config.guidance and not tokens:
            raise UserError("--guidance needs a prompt to do without; give one or leave it out")
        check_fits(len(tokens), self._config.length, self._context)
        check_block_model(self._block_size, self._config)
        return Request(prompt, tuple(tokens), self._config)

    def _asked(self, prompt: Prompt) -> list[int]:
        assert self.speech is not None
        messages = prompt.messages or (Message("user", prompt.text),)
        if self._options.system is not None and messages[0].role != "system":
            messages = (Message("system", self._options.system), *messages)
        return self.speech.prompt(messages)

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
        steps = self._options.sampler.get("steps")
        if steps is None and self._config.strategy != "first_hitting":
            steps = canvas.count(mask)
        return Request(prompt, tuple(canvas), self._sampler(len(canvas), steps=steps))


class Writer:
    """A loaded run that writes texts.

    Attributes:
        texts: so far.
    """

    def __init__(
        self,
        saved: SavedRun,
        world: World,
        tokenizer: Tokenizer,
        options: TextOptions,
        on_text: OnText,
        speech: Speech | None = None,
    ) -> None:
        self._saved, self._world, self._tokenizer, self._options = saved, world, tokenizer, options
        self._speech = speech
        self._on_text = on_text if world.is_main else lambda text, streamed: None
        self._denoiser = load_model(saved, world, tokenizer)
        self._streams = options.stream and world.is_main and world.data_size == 1
        self.texts: list[Text] = []

    def write(self, requests: list[Request]) -> None:
        """Generate the samples of each request, and add them to `texts` and `output`; every rank calls this."""
        options, world = self._options, self._world
        samples = range(options.samples)
        in_blocks = self._denoiser.block_size is not None  # takes prompts of different lengths together
        keys = [(0 if in_blocks else len(request.tokens), request.config) for request in requests]
        groups = batches(keys, options.batch_size)
        jobs = [(group, sample) for group in groups for sample in samples]
        alone = len(requests) == 1
        at_once = alone and world.data_size == 1
        visible = world.is_main and not at_once and len(jobs) > 1
        with progress("batches", len(jobs), visible=visible, transient=True) as move:

            def work(job: tuple[list[int], int]) -> list[Text]:
                group, sample = job
                texts = self._batch([requests[place] for place in group], sample, alone=alone)
                if at_once:
                    self._on_text(texts[0], self._streams and self._speech is None)
                move()
                return texts

            found = shared(world, jobs, work)
        texts = {
            (place, sample): text
            for (group, sample), batch in zip(jobs, found, strict=True)
            for place, text in zip(group, batch, strict=True)
        }
        ordered = [texts[place, sample] for place in range(len(requests)) for sample in samples]
        for text in ordered if not at_once else []:
            self._on_text(text, False)
        self.texts += ordered
        if options.output and world.is_main:
            replace_file(options.output, "".join(json.dumps(asdict(text)) + "\n" for text in self.texts))

    def _batch(self, requests: list[Request], sample: int, *, alone: bool) -> list[Text]:
        """Texts of requests that go together; a lone one is shown while it is written."""
        config = replace(requests[0].config, seed=requests[0].config.seed + sample)
        recorder = Recorder(self._tokenizer.mask_token_id)
        start = time.perf_counter()
        if alone and self._streams:
            is_chat = self._speech is not None
            first = len(requests[0].tokens) if is_chat else 0
            mask = self._tokenizer.mask_token_id
            with LiveCanvas(self._decode, mask, start=first, transient=is_chat) as live:
                result = self._denoise(requests, config, _both(live.on_step, recorder.on_step))
        else:
            result = self._denoise(requests, config, recorder.on_step if self._options.save_trace else None)
        seconds = time.perf_counter() - start
        rows = [self._written(row[-config.length :]) for row in result.tokens_BL.tolist()]
        texts = [
            Text(
                prompt=request.prompt.text,
                text=written,
                seed=config.seed,
                tokens=tokens,
                forward_passes=result.forward_passes,
                steps=result.steps,
                seconds=seconds,
            )
            for request, (written, tokens) in zip(requests, rows, strict=True)
        ]
        if self._options.save_trace and self._world.is_main:
            self._save_trace(self._options.save_trace, recorder, texts[0], config)
        return texts

    def _written(self, tokens: list[int]) -> tuple[str, list[int]]:
        return self._speech.answer(tokens) if self._speech is not None else (self._tokenizer.decode(tokens), tokens)

    def _denoise(self, requests: list[Request], config: SamplerConfig, on_step: OnStep | None) -> Sample:
        mask, eos = self._tokenizer.mask_token_id, self._tokenizer.eos_token_id
        rows = [request.tokens for request in requests]
        seeds = [config.seed] * len(rows)  # a text does not depend on what it is batched with
        if not self._options.infill:
            return fill(
                self._denoiser,
                rows,
                config,
                mask_token_id=mask,
                eos_token_id=eos,
                eot_token_ids=self._speech.eot_token_ids if self._speech is not None else (),
                on_step=on_step,
                seeds=seeds,
            )
        canvas_BL = torch.tensor(rows, dtype=torch.int64, device=self._denoiser.device)
        return infill(
            Decoder(self._denoiser, config.cache),
            canvas_BL,
            config,
            mask_token_id=mask,
            eos_token_id=eos,
            on_step=on_step,
            seeds=seeds,
        )

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, show_special=True)

    def _save_trace(self, path: Path, recorder: Recorder, text: Text, config: SamplerConfig) -> None:
        facts = {
            "run": f"{self._saved.path}, step {self._saved.step}",
            "prompt": printable(text.prompt, multiline=True),
            "strategy": f"{config.strategy}, temperature {config.temperature:g}, seed {config.seed}",
            "steps": f"{text.steps}, {text.forward_passes} forward passes",
        }
        title = f"{printable(text.prompt)[:60]} – {text.steps} denoising steps"
        replace_file(path, trace_page(recorder, self._decode, title=title, facts=facts))


def _both(first: OnStep, second: OnStep) -> OnStep:
    def on_step(step: SamplerStep) -> None:
        first(step)
        second(step)

    return on_step

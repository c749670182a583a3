"""How likely samples of a run are to a causal run, and how varied they are.

A sampler that repeats itself is very likely to any judge, so that perplexities compare only at equal unigram entropy
(Zheng et al., arXiv 2409.02908): temperatures are swept, and the perplexity is read off where samples are as varied as
text of the same length. Entropy is that of the tokens within one sample, in nats, averaged over samples; at most the
log of the length. How far the samples' tokens and pairs of neighbours are distributed from those of the text is their
total-variation distance; two samples of text of that size have some distance too, which stands in the text's line.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_md import parallel
from megatron_md.config import Config
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.diffusion.conditional import ConditionalEstimator
from megatron_md.diffusion.sampler_config import SamplerConfig
from megatron_md.diffusion.scoring import GuidedScorer
from megatron_md.errors import UserError
from megatron_md.evaluate.conditional import document_log_likelihoods
from megatron_md.evaluate.load import is_causal, load_model
from megatron_md.evaluate.rows import evaluation_rows
from megatron_md.parallel import World, shared
from megatron_md.run.saved import SavedRun
from megatron_md.train.filling import fill
from megatron_md.train.inference import Inference

Tokens = list[int]


@dataclass(frozen=True)
class Quality:
    """What one setting of the sampler gives.

    Attributes:
        temperature: of the sampler.
        steps: denoising steps that were allowed.
        forward_passes: of the model for a sample, on average.
        perplexity: of the samples under the judge, per token of the judge.
        stderr: standard error of its logarithm over samples; nan of a single one.
        entropy: unigram entropy within a sample in nats, averaged over samples.
        unigram_distance: total variation between the token frequencies of samples and text; nan without a text.
        bigram_distance: the same of pairs of neighbours.
        seconds: for all samples.
    """

    temperature: float
    steps: int
    forward_passes: float
    perplexity: float
    stderr: float
    entropy: float
    unigram_distance: float
    bigram_distance: float
    seconds: float


@dataclass(frozen=True)
class TextQuality:
    """The same of real text, whose samples are compared with as many others."""

    perplexity: float
    stderr: float
    entropy: float
    unigram_distance: float
    bigram_distance: float


@dataclass(frozen=True)
class GenerativeOptions:
    """What is sampled.

    Attributes:
        samples: for each setting.
        length: tokens of a sample; the run's row if None.
        steps: denoising steps, one setting each; one per token if there are none. A causal run takes no other.
        block: tokens per block, from left to right; all if None.
        strategy: of the sampler.
        temperatures: of the sampler, one setting each.
        reference: text to compare with: a manifest, or text files; the run's `data.valid`, if it is there, by default.
        seed: of sampling.
        micro_batch_size: rows per forward pass.
    """

    samples: int = 64
    length: int | None = None
    steps: Sequence[int] = ()
    block: int | None = None
    strategy: str = "ancestral"
    temperatures: Sequence[float] = (1.0,)
    reference: Sequence[str] = ()
    seed: int = 0
    micro_batch_size: int = 8


@dataclass(frozen=True)
class GenerativeReport:
    """What was found.

    Attributes:
        run: the checkpoint that wrote.
        judge: the checkpoint that judged.
        samples: of each setting.
        length: tokens of a sample.
        strategy: of the sampler.
        seed: of sampling.
        text: real text, if there is any to compare with.
        settings: those that are done.
        perplexity_at_text_entropy: by the number of steps; None where no two temperatures lie around it.
    """

    run: str
    judge: str
    samples: int
    length: int
    strategy: str
    seed: int
    text: TextQuality | None = None
    settings: Sequence[Quality] = ()
    perplexity_at_text_entropy: Mapping[str, float | None] = field(default_factory=dict)


def unigram_entropy(samples: Sequence[Sequence[int]]) -> float:
    """Entropy of the token frequencies within a sample, in nats, averaged over samples."""
    return float(np.mean([_entropy(np.unique(sample, return_counts=True)[1]) for sample in samples]))


def _entropy(count_K: np.ndarray[Any, Any]) -> float:
    share_K = count_K / count_K.sum()
    return float(-(share_K * np.log(share_K)).sum())


def ngram_distance(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], order: int) -> float:
    """Total variation, sum |p - q| / 2, between the frequencies of the n-grams within two sets of samples; 0 to 1."""
    one, two = (
        Counter(gram for sample in samples for gram in zip(*(sample[at:] for at in range(order)), strict=False))
        for samples in (first, second)
    )
    ones, twos = max(one.total(), 1), max(two.total(), 1)
    return sum(abs(one[gram] / ones - two[gram] / twos) for gram in one | two) / 2.0


def perplexity_at(entropy: float, qualities: Sequence[Quality]) -> float | None:
    """Perplexity at an entropy: log perplexity by entropy, linear between neighbours; None beyond the settings."""
    points = sorted((quality.entropy, math.log(quality.perplexity)) for quality in qualities)
    if not points or not points[0][0] <= entropy <= points[-1][0]:
        return None
    entropies, logs = zip(*points, strict=True)
    return math.exp(float(np.interp(entropy, entropies, logs)))


class Judge:
    """A causal run that says how likely texts are."""

    def __init__(self, saved: SavedRun, words: Tokenizer, scorer: GuidedScorer) -> None:
        self.words, self.scorer = words, scorer
        self.max_length = saved.config.model.max_length

    def __call__(self, samples: Sequence[Tokens], tokenizer: Tokenizer) -> tuple[float, float]:
        """Nats per token of the judge, and their standard error over samples; every rank gets them.

        Where the tokenizers differ the text of each document of a sample is encoded anew.
        """
        if tokenizer.sha256 != self.words.sha256:
            samples = [self._encoded_anew(sample, tokenizer) for sample in samples]
        samples = [sample for sample in samples if sample]
        if not samples:
            return math.nan, math.nan
        found = document_log_likelihoods(
            self.scorer,
            samples,
            ConditionalEstimator("autoregressive"),
            mask_token_id=self.words.mask_token_id,
            eos_token_id=self.words.eos_token_id,
            max_length=self.max_length,
        )
        nats_S = -np.array([sample.log_likelihood for sample in found])
        tokens_S = np.array([len(sample) for sample in samples])
        mean, count = nats_S.sum() / tokens_S.sum(), len(samples)
        spread = (
            math.sqrt(float(((nats_S - mean * tokens_S) ** 2).sum()) / (count - 1) * count) if count > 1 else math.nan
        )
        return float(mean), spread / float(tokens_S.sum())

    def _encoded_anew(self, sample: Tokens, tokenizer: Tokenizer) -> Tokens:
        tokens: Tokens = []
        start = 0
        for end in [at for at, token in enumerate(sample) if token == tokenizer.eos_token_id]:
            tokens += [*self.words.encode(tokenizer.decode(sample[start:end])).tolist(), self.words.eos_token_id]
            start = end + 1
        return tokens + self.words.encode(tokenizer.decode(sample[start:])).tolist()


def evaluate_generative(
    saved: SavedRun,
    judge: SavedRun,
    options: GenerativeOptions,
    *,
    on_progress: Callable[[GenerativeReport], None] = lambda report: None,
) -> GenerativeReport | None:
    """Sample with every setting, and judge; the figures on the main rank, None elsewhere.

    Args:
        saved: the run that writes.
        judge: a causal run.
        options: what is sampled.
        on_progress: given on the main rank the report so far, before the first setting and after each.

    Raises:
        UserError: bad input, with the way out.
    """
    tokenizer, judge_words = Tokenizer(saved.tokenizer), Tokenizer(judge.tokenizer)
    if not is_causal(judge, mask_token_id=judge_words.mask_token_id):
        raise UserError(f"--judge {judge.path}: is not causal, so that it has no exact perplexity; give a causal run")
    train = replace(saved.config.train, micro_batch_size=options.micro_batch_size)
    saved, judge = (replace(run, config=replace(run.config, train=train)) for run in (saved, judge))
    settings = _settings(options, saved, causal=is_causal(saved, mask_token_id=tokenizer.mask_token_id))
    length = settings[0].length
    reference = _reference(options, saved.config, tokenizer, length)
    with parallel.session(saved.config) as world:
        denoiser = load_model(saved, world, tokenizer)
        judging = Judge(judge, judge_words, load_model(judge, world, judge_words))
        text = _text_quality(reference, judging, tokenizer) if reference else None
        run, judged_by = saved.label, judge.label
        report = GenerativeReport(run, judged_by, options.samples, length, options.strategy, options.seed, text)
        if world.is_main:
            on_progress(report)
        for setting in settings:
            quality = _quality(setting, options.samples, denoiser, judging, world, tokenizer, reference[1::2])
            report = replace(report, settings=[*report.settings, quality])
            if world.is_main:
                on_progress(report)
    return replace(report, perplexity_at_text_entropy=_matched(report)) if world.is_main else None


def _settings(options: GenerativeOptions, saved: SavedRun, *, causal: bool) -> list[SamplerConfig]:
    """Of the sampler, checked: every temperature with every number of steps (one for a causal run)."""
    context = saved.config.model.max_length
    length = options.length or saved.config.data.seq_length
    if length > context:
        raise UserError(f"--length {length} exceeds the {context} positions of {saved.checkpoint}")
    return [
        SamplerConfig(
            length=length,
            steps=count,
            block=1 if causal else options.block,
            strategy="low_confidence" if causal else options.strategy,
            temperature=temperature,
            seed=options.seed,
        )
        for temperature in options.temperatures
        for count in ([length] if causal or not options.steps else options.steps)
    ]


def _reference(options: GenerativeOptions, config: Config, tokenizer: Tokenizer, length: int) -> list[Tokens]:
    """Rows of real text, as long as the samples and up to twice as many; none if there is no text."""
    valid = config.data.valid
    data = options.reference or ([valid] if valid is not None and Path(valid).exists() else ())
    if not data:
        return []
    config = replace(config, data=replace(config.data, seq_length=length))
    rows = evaluation_rows(data, [config], tokenizer, count=2 * options.samples)
    # A row that is not full has less to vary in.
    is_full_R = rows.is_maskable_RL[:, 1:].all(axis=1)
    if not is_full_R.any():
        raise UserError(
            f"{' '.join(data)}: holds less than the {length} tokens of a sample; give --reference more text"
        )
    found: list[Tokens] = rows.tokens_RL[is_full_R].tolist()
    return found


def _text_quality(reference: list[Tokens], judging: Judge, tokenizer: Tokenizer) -> TextQuality:
    """Of every second row, set against the others."""
    rows, others = reference[::2], reference[1::2]
    nats, stderr = judging(rows, tokenizer)
    return TextQuality(math.exp(nats), stderr, unigram_entropy(rows), *_distances(rows, others))


def _distances(samples: list[Tokens], text: list[Tokens]) -> tuple[float, float]:
    """By unigrams and by bigrams."""
    if not text:
        return math.nan, math.nan
    return ngram_distance(samples, text, 1), ngram_distance(samples, text, 2)


def _quality(
    setting: SamplerConfig,
    count: int,
    denoiser: Inference,
    judging: Judge,
    world: World,
    tokenizer: Tokenizer,
    text: list[Tokens],
) -> Quality:
    """Sample in batches with seeds of their own, which data-parallel ranks share; every rank judges."""
    size = judging.scorer.micro_batch_size
    sizes = [min(size, count - start) for start in range(0, count, size)]
    start = time.perf_counter()

    def work(number: int) -> tuple[list[Tokens], int]:
        config = replace(setting, seed=setting.seed + number)
        prompts: list[Tokens] = [[]] * sizes[number]
        result = fill(
            denoiser, prompts, config, mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id
        )
        return result.tokens_BL[:, -config.length :].tolist(), result.forward_passes * sizes[number]

    found = shared(world, range(len(sizes)), work)
    seconds = time.perf_counter() - start
    samples = [sample for batch, _ in found for sample in batch]
    nats, stderr = judging(samples, tokenizer)
    unigram_distance, bigram_distance = _distances(samples, text)
    return Quality(
        temperature=setting.temperature,
        steps=setting.total_steps,
        forward_passes=sum(passes for _, passes in found) / count,
        perplexity=math.exp(nats) if nats < 700.0 else math.inf,
        stderr=stderr,
        entropy=unigram_entropy(samples),
        unigram_distance=unigram_distance,
        bigram_distance=bigram_distance,
        seconds=seconds,
    )


def _matched(report: GenerativeReport) -> dict[str, float | None]:
    """By the number of steps, perplexity at the text's entropy."""
    if report.text is None:
        return {}
    entropy, qualities = report.text.entropy, report.settings
    steps = dict.fromkeys(quality.steps for quality in qualities)
    return {
        str(count): perplexity_at(entropy, [quality for quality in qualities if quality.steps == count])
        for count in steps
    }

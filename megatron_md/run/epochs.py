"""The steps of a run that asks for epochs, from its corpus, and the epochs that a run of steps makes; without torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_md.config import Config, ConfigError
from megatron_md.config.schema import MOST
from megatron_md.data.cache import Cache
from megatron_md.data.mixture import CorpusStream, MixtureStream, corpus_stream, open_stream
from megatron_md.data.remote import is_url
from megatron_md.data.repeated import RepeatedRows
from megatron_md.data.shards import load_manifest
from megatron_md.data.stream import RowStream
from megatron_md.train.progress import rows_before


@dataclass(frozen=True)
class Passes:
    """How often a run goes through one of its corpora.

    Attributes:
        corpus: what messages call it.
        unique_tokens: tokens of the documents that are served, without `<eos>`.
        documents: how many these are.
        epochs: passes over them in the whole run.
    """

    corpus: str
    unique_tokens: int
    documents: int
    epochs: float

    def __str__(self) -> str:
        return f"{self.unique_tokens:,} unique tokens in {self.documents:,} documents, {self.epochs:.2f} epochs"


def told_passes(value: Any) -> list[str]:
    """How often each corpus is gone through, from the `corpora` of a summary.json that may say anything."""
    try:
        return [f"{made.corpus}: {made}" for made in TypeAdapter(list[Passes]).validate_python(value or [])]
    except ValidationError:
        return []


def passes(config: Config, stream: RowStream) -> list[Passes]:
    """What a run makes of each of its corpora, if no batch is left out.

    Args:
        config: the run, its steps counted.
        stream: its rows, from `open_stream`.
    """
    rows = rows_before(config, config.train.steps)
    if isinstance(stream, RepeatedRows):
        rows //= stream.times
        stream = stream.stream
    if isinstance(stream, MixtureStream):
        streams, shares = stream.streams, stream.schedule.served(rows)
    else:
        assert isinstance(stream, CorpusStream), "there are no others"
        streams, shares = [stream], [rows]
    return [
        Passes(corpus.label, own.subset.tokens, own.subset.documents, share / own.rows_per_epoch)
        for corpus, own, share in zip(config.data.corpora(), streams, shares, strict=True)
    ]


def local_passes(config: Config) -> list[Passes]:
    """`passes` of a checked run whose corpora all exist on this machine; nothing of another one."""
    paths = [corpus.manifest for corpus in config.data.corpora()]
    if not paths or any(is_url(path) or not Path(path).exists() for path in paths):
        return []
    manifests = [load_manifest(path) for path in paths]
    return passes(
        config, open_stream(config.data, manifests, seed=config.seed, rows_per_text=config.objective.rows_per_text)
    )


def count_steps(config: Config) -> Config:
    """The config with `train.steps` in place of `train.epochs`: the fewest whose global batches hold so many rows.

    The last batch goes on into the next epoch where it is not full. A config without `train.epochs` stays as it is.

    Raises:
        ConfigError: there is no corpus, or more than one, or the steps contradict another key.
        UserError: the corpus cannot be read.
    """
    epochs = config.train.epochs
    if epochs is None:
        return config
    corpora = config.data.corpora()
    if not corpora:
        raise ConfigError("train.epochs counts passes over data.train, which is not set: give it, or train.steps")
    if len(corpora) > 1:
        raise ConfigError("train.epochs counts passes over one corpus, and data.train mixes several: give train.steps")
    manifest = load_manifest(corpora[0].manifest, cache=Cache.of(config.data))
    per_epoch = corpus_stream(config.data, corpora[0], manifest, seed=config.seed).rows_per_epoch
    rows = math.ceil(Fraction(str(epochs)) * per_epoch) * config.objective.rows_per_text
    steps = bisect_left(range(MOST), rows, lo=1, key=lambda step: rows_before(config, step))
    counted = replace(config, train=replace(config.train, steps=steps, epochs=None))
    if lines := list(counted.problems()):
        raise ConfigError([f"train.epochs {epochs:g} of {per_epoch} rows: {line}" for line in lines])
    return counted

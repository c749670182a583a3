"""The steps of a run that asks for epochs, from its corpus; without torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import replace
from fractions import Fraction

from megatron_md.config import Config, ConfigError
from megatron_md.config.schema import MOST
from megatron_md.data.cache import Cache
from megatron_md.data.mixture import corpus_stream
from megatron_md.data.shards import load_manifest
from megatron_md.train.progress import rows_before


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
    rows = math.ceil(Fraction(str(epochs)) * per_epoch)
    steps = bisect_left(range(MOST), rows, lo=1, key=lambda step: rows_before(config, step))
    counted = replace(config, train=replace(config.train, steps=steps, epochs=None))
    if lines := list(counted.problems()):
        raise ConfigError([f"train.epochs {epochs:g} of {per_epoch} rows: {line}" for line in lines])
    return counted

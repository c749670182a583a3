"""Contradictions between a config and its chat corpora; without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_md.config import ChatConfig, Config
from megatron_md.data.chat_rows import document_lengths, too_long
from megatron_md.data.shards import Manifest


def chat_problems(config: Config, manifests: Mapping[str, Manifest]) -> Iterator[str]:
    """A line for each contradiction.

    Args:
        config: the run.
        manifests: of its corpora, as far as they exist, by the keys that name them.
    """
    chats = {key: manifest for key, manifest in manifests.items() if manifest.kind == "chat"}
    train = [manifest.kind for key, manifest in manifests.items() if key != "data.valid"]
    if train and "chat" not in train and config.data.chat != ChatConfig():
        yield "data.chat is about rows of dialogues, and data.train holds none: leave it out, or build it with --chat"
    if "chat" in train:
        yield from _row_problems(config, has_text="text" in train)
    for key, manifest in chats.items():
        # Those at URLs are read when the run starts.
        try:
            problem = manifest.remote is None and too_long(manifest, document_lengths(manifest), config.data.seq_length)
        except ValueError as error:
            problem = str(error)
        if problem:
            yield f"{key}: {problem}"


def _row_problems(config: Config, *, has_text: bool) -> Iterator[str]:
    chat, train, layout = config.data.chat, config.train, config.parallel
    if config.data.random_length_fraction:
        yield "data.random_length_fraction cuts rows, and dialogues stay whole: set it to 0"
    if config.objective.attention_annealing and (chat.padding != "answer" or chat.eos_cap is not None):
        yield (
            "objective.attention_annealing hides pairs of whole rows, and dialogues hide their padding: "
            "set data.chat.eos_padding=answer without data.chat.eos_cap, or attention_annealing=0"
        )
    if chat.is_packed and has_text:
        yield "data.train: packed dialogues are not mixed with text; set data.chat.rows=padded"
    split = layout.context * 16 * (layout.tensor if layout.sequence_parallel else 1)
    if train.precision == "fp8" and not chat.is_packed and train.micro_batch_size * config.row_unit % split:
        yield (
            f"train.precision fp8 needs train.micro_batch_size x data.chat.length_multiple {chat.length_multiple} "
            f"to be a multiple of {split}"
        )

"""Contradictions between a config and chat corpora, each in one line and before the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.config import Config, config_from_mapping
from megatron_md.data.writer import Tokenised, Vocabulary, write_corpus
from megatron_md.run.check import check_config
from megatron_md.run.check_corpora import corpus_problems
from tests.data.small_chat import random_dialogues, write_chat_corpus
from tests.data.small_corpus import EOS, MASK, PAD, flip_byte


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    for number, name in enumerate(("train", "valid")):
        write_chat_corpus(folder / name, random_dialogues(20, longest=32, seed=number))
    text = [Tokenised(np.arange(4, 60), 56)] * 20
    write_corpus([text], Vocabulary(200, EOS, MASK, PAD, "0" * 64), folder / "text")
    return folder


def config_of(folder: Path, data: dict[str, Any], **sections: Any) -> Config:
    base = {"train": str(folder / "train"), "valid": str(folder / "valid"), "seq_length": 32}
    return config_from_mapping({"run_dir": str(folder / "run"), "data": {**base, **data}, **sections})


def mixed(folder: Path) -> list[dict[str, Any]]:
    return [{"manifest": str(folder / name), "weight": 1.0} for name in ("train", "text")]


PACKED = {"document_attention": "within_document", "chat": {"rows": "packed"}}


def test_what_can_be_run(folder: Path) -> None:
    for data in ({}, PACKED, {"train": mixed(folder)}, {"train": str(folder / "text"), "chat": {}}):
        assert list(corpus_problems(config_of(folder, data))) == []
        check_config(config_of(folder, data), 1)


@pytest.mark.parametrize(
    ("data", "sections", "message"),
    [
        ({"seq_length": 16, "valid": None}, {}, "data.train: {0}/train: document"),
        ({"seq_length": 16, "train": None}, {}, "data.valid: {0}/valid: document"),
        ({"train": "{0}/text", "chat": {"eos_padding": "one"}}, {}, "data.chat is about rows of dialogues, and"),
        ({"random_length_fraction": 0.1}, {}, "data.random_length_fraction cuts rows, and dialogues stay whole"),
        ({**PACKED, "train": "mixed"}, {}, "packed dialogues are not mixed with text; set data.chat.rows=padded"),
        (
            {"chat": {"eos_padding": "one"}},
            {"objective": {"attention_annealing": 0.5}},
            "objective.attention_annealing hides pairs of whole rows, and dialogues hide their padding",
        ),
        (
            {"chat": {"length_multiple": 2}},
            {"train": {"precision": "fp8", "micro_batch_size": 4}},
            "train.precision fp8 needs train.micro_batch_size x data.chat.length_multiple 2 to be a multiple of 16",
        ),
    ],
)
def test_contradictions(folder: Path, data: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    keys = {key: value.format(folder) if isinstance(value, str) else value for key, value in data.items()}
    if keys.get("train") == "mixed":
        keys["train"] = mixed(folder)
    (line,) = corpus_problems(config_of(folder, keys, **sections))
    assert message.format(folder) in line and "\n" not in line


def test_a_damaged_index_is_a_line_too(tmp_path: Path) -> None:
    corpus = write_chat_corpus(tmp_path / "train", random_dialogues(20, longest=32))
    flip_byte(tmp_path / "train" / corpus.shards[0].index, 200)
    (line,) = corpus_problems(config_of(tmp_path, {"valid": None}))
    assert "data.train: " in line and corpus.shards[0].index in line

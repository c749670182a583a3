"""Whole runs on dialogues: every layout and split of a batch gives the same numbers, and epochs resume to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.config import ChatConfig, Config
from tests.data.small_chat import random_dialogues, write_chat_corpus
from tests.ranks import run_ranks
from tests.small_run import VOCAB
from tests.train.test_trainer import config_for, metrics, pretrain, pretrain_and_die_after, without_times

STEPS = 4
PADDED = {"chat": ChatConfig(length_multiple=8), "document_attention": "full"}
PACKED = {"chat": ChatConfig(rows="packed"), "document_attention": "within_document"}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("chat")
    for number, split in enumerate(("train", "valid")):
        dialogues = random_dialogues(40, longest=(32, 20)[number], vocab_size=VOCAB, seed=number)
        write_chat_corpus(folder / split, dialogues, vocab_size=VOCAB)
    return {split: str(folder / split) for split in ("train", "valid")}


def chat_config(run_dir: Path, corpora: dict[str, str], data: dict[str, Any], **sections: dict[str, Any]) -> Config:
    keys: dict[str, Any] = {"validation": {"every_steps": 2, "sequences": 12}, **sections}
    keys["objective"] = {"name": "masked_diffusion_sft", **keys.get("objective", {})}
    keys["train"] = {"steps": STEPS, **keys.get("train", {})}
    return config_for(run_dir, corpora, data=data, **keys)


def figures(run_dir: Path) -> np.ndarray[Any, Any]:
    """What must not depend on the layout."""
    names = ("loss", "grad_norm", "masked_ce", "mean_mask_rate", "tokens")
    records = metrics(run_dir)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    nelbo = [record["val_nelbo"] for record in records if "val_nelbo" in record]
    assert len(nelbo) == 2
    return np.array([*(record[name] for record in records for name in names), *nelbo])


@pytest.fixture(scope="module")
def reference(corpora: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray[Any, Any]]:
    """One process, a row per micro-batch."""
    found = {}
    for name, data in (("padded", PADDED), ("packed", PACKED)):
        run_dir = tmp_path_factory.mktemp(name)
        run_ranks(pretrain, 1, chat_config(run_dir, corpora, data, train={"micro_batch_size": 1}))
        found[name] = figures(run_dir)
    return found


SEQUENCE = {"tensor": 2, "sequence_parallel": True}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
SLOW = pytest.mark.slow


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rows", "size", "layout", "micro_batch"),
    [
        ("padded", 1, {}, 4),
        pytest.param("padded", 2, {}, 2, marks=SLOW),
        ("padded", 2, SEQUENCE, 2),
        pytest.param("padded", 2, INTERLEAVED, 2, marks=SLOW),
        pytest.param("padded", 2, {"pipeline": 2}, 1, marks=SLOW),
        pytest.param("padded", 2, {"context": 2}, 2, marks=SLOW),
        pytest.param("padded", 4, {"context": 2, "tensor": 2}, 1, marks=SLOW),
        pytest.param("padded", 4, {"pipeline": 2}, 2, marks=SLOW),
        pytest.param("packed", 2, {}, 2, marks=SLOW),
        pytest.param("packed", 2, SEQUENCE, 2, marks=SLOW),
        pytest.param("packed", 2, INTERLEAVED, 2, marks=SLOW),
        pytest.param("packed", 2, {"context": 2}, 4, marks=SLOW),
    ],
)
def test_layouts_and_splits_of_a_batch_give_the_same_numbers(
    tmp_path: Path,
    corpora: dict[str, str],
    reference: dict[str, np.ndarray[Any, Any]],
    rows: str,
    size: int,
    layout: dict[str, Any],
    micro_batch: int,
) -> None:
    data = PADDED if rows == "padded" else PACKED
    config = chat_config(tmp_path, corpora, data, parallel=layout, train={"micro_batch_size": micro_batch})
    run_ranks(pretrain, size, config)
    np.testing.assert_allclose(figures(tmp_path), reference[rows], rtol=1e-5)


def test_short_batches_are_served_short(reference: dict[str, np.ndarray[Any, Any]]) -> None:
    tokens = {name: found[4 : 5 * STEPS : 5] for name, found in reference.items()}
    assert tokens["packed"].tolist() == [8 * 32 * step for step in range(1, STEPS + 1)]
    assert tokens["padded"][-1] <= 8 * 32 * STEPS and (np.diff(tokens["padded"]) % (8 * 8) == 0).all()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("keys", [{"eos_padding": "one"}, {"eos_cap": 3}])
def test_padding_changes_nothing(tmp_path: Path, corpora: dict[str, str], keys: dict[str, Any]) -> None:
    """Neither loss nor gradient nor the validation NELBO depend on how far the rows are filled up."""
    found = []
    for multiple in (4, 32):
        run_dir = tmp_path / str(multiple)
        data = {"chat": ChatConfig(length_multiple=multiple, group_by_length=8, **keys)}
        run_ranks(pretrain, 1, chat_config(run_dir, corpora, data))
        found.append(figures(run_dir))
    is_tokens = np.arange(len(found[0])) % 5 == 4
    is_tokens[5 * STEPS :] = False
    assert (found[0][is_tokens] < found[1][is_tokens]).any()
    np.testing.assert_allclose(found[0][~is_tokens], found[1][~is_tokens], rtol=1e-5)


@pytest.mark.distributed
def test_epochs_of_dialogues_resume_to_the_bit(tmp_path: Path, corpora: dict[str, str]) -> None:
    chat = {"chat": ChatConfig(length_multiple=4, group_by_length=4, eos_cap=2)}
    keys: dict[str, Any] = {"train": {"epochs": 1.3, "steps": 400}}
    run_ranks(pretrain, 1, chat_config(tmp_path / "whole", corpora, chat, **keys))
    assert len(metrics(tmp_path / "whole")) == 7
    lengths = np.diff([0, *(record["tokens"] for record in metrics(tmp_path / "whole"))])
    assert len(set(lengths.tolist())) > 1
    first = chat_config(tmp_path / "parts", corpora, chat, checkpoint={"every_steps": 3}, **keys)
    run_ranks(pretrain_and_die_after, 1, first, 4, timeout=60)
    run_ranks(pretrain, 1, replace(first, data=replace(first.data, prefetch=0)))
    assert without_times(metrics(tmp_path / "parts")) == without_times(metrics(tmp_path / "whole"))
    other = replace(first, data=replace(first.data, chat=replace(first.data.chat, eos_cap=3)))
    with pytest.raises(AssertionError, match=r"data\.chat\.eos_cap"):
        run_ranks(pretrain, 1, replace(other, train=replace(other.train, epochs=2.0)))

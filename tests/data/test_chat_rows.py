"""Rows of dialogues: each once per epoch, only answers and counted `<eos>` maskable, one length per global batch."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_md.batch import BatchPosition, Rows
from megatron_md.config import ChatConfig, CorpusConfig, DataConfig
from megatron_md.data.chat_rows import DialogueStream, document_lengths, too_long, validation_rows
from megatron_md.data.mixture import MixtureStream, open_stream
from megatron_md.data.shards import Manifest, ShardError
from megatron_md.data.stream import micro_batches
from megatron_md.train.progress import row_length_at
from tests.data.small_chat import Dialogue, all_dialogues, random_dialogues, write_chat_corpus
from tests.data.small_corpus import EOS, PAD, WriteCorpus, flip_byte
from tests.small_run import variant

L, DOCUMENTS = 32, 61


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_chat_corpus(tmp_path_factory.mktemp("chat") / "corpus", random_dialogues(DOCUMENTS, longest=L))


def stream(manifest: Manifest, seed: int = 5, **keys: Any) -> DialogueStream:
    return DialogueStream(manifest, ChatConfig(**keys), seed=seed, seq_length=L)


def pieces(rows: Rows, b: int) -> list[tuple[list[int], list[int]]]:
    """What lies between the boundaries of a row: tokens, and places that are maskable."""
    assert rows.cu_seqlens is not None
    cuts = rows.cu_seqlens[b].tolist()
    return [
        (rows.tokens_BL[b, begin:end].tolist(), np.flatnonzero(rows.is_maskable_BL[b, begin:end]).tolist())
        for begin, end in pairwise(cuts)
    ]


def expected(dialogue: Dialogue, eos: int) -> tuple[list[int], list[int]]:
    """A dialogue with so many `<eos>` behind it, all of which count."""
    tokens, runs = dialogue
    answers = [place for run in runs for place in range(*run)]
    return [*tokens, *[EOS] * eos], [*answers, *range(len(tokens), len(tokens) + eos)]


@pytest.mark.parametrize(
    ("keys", "most"),
    [
        ({}, L),
        ({"eos_padding": "answer", "eos_cap": 3}, 3),
        ({"eos_padding": "one"}, 1),
        ({"eos_padding": "ignore"}, 0),
        ({"group_by_length": 8}, L),
        ({"rows": "packed"}, 1),
        ({"rows": "packed", "eos_padding": "ignore"}, 0),
        ({"rows": "packed", "eos_padding": "answer", "eos_cap": 4}, 4),
    ],
)
def test_an_epoch_holds_every_dialogue_once_and_masks_nothing_but_answers(
    manifest: Manifest, keys: dict[str, Any], most: int
) -> None:
    source = stream(manifest, **keys)
    per_epoch = source.rows_per_epoch
    wanted = Counter(
        (tuple(tokens), tuple(places))
        for tokens, places in (expected(d, min(most, L - len(d[0]))) for d in all_dialogues(manifest))
    )
    orders = []
    for epoch in (0, 3):
        rows = source.rows(range(epoch * per_epoch, (epoch + 1) * per_epoch))
        found = Counter[Any]()
        for b in range(per_epoch):
            parts = pieces(rows, b)
            if set(parts[-1][0]) == {PAD}:
                assert parts.pop()[1] == [], "padding is not maskable"
            if source.is_ragged:
                assert rows.content_B is not None and rows.content_B[b] == len(parts[0][0])
            assert len(parts) == 1 or keys.get("rows") == "packed"
            found.update((tuple(tokens), tuple(places)) for tokens, places in parts)
        assert found == wanted
        orders.append(rows.tokens_BL)
    assert (orders[0] != orders[1]).any(), "every epoch has its own order"
    # Any g is found by itself, and another seed gives another order.
    anywhere = stream(manifest, **keys).rows([3 * per_epoch + 2])
    np.testing.assert_array_equal(anywhere.tokens_BL[0], orders[1][2])
    assert (stream(manifest, seed=6, **keys).rows(range(per_epoch)).tokens_BL != orders[0]).any()


def test_packed_rows_are_full_and_the_same_in_every_epoch(manifest: Manifest) -> None:
    source = stream(manifest, rows="packed")
    tokens = document_lengths(manifest).sum() + DOCUMENTS
    assert source.rows_per_epoch <= 1.15 * tokens / L and not source.is_ragged
    rows = [source.rows(range(epoch * source.rows_per_epoch, (epoch + 1) * source.rows_per_epoch)) for epoch in (0, 1)]
    assert sorted(rows[0].tokens_BL.tolist()) == sorted(rows[1].tokens_BL.tolist())
    assert rows[0].counts_documents and not stream(manifest).rows([0]).counts_documents


def test_row_lengths_hold_all_that_is_served(manifest: Manifest) -> None:
    for keys, least in (({}, 1), ({"eos_padding": "one"}, 1), ({"eos_padding": "ignore"}, 0), ({"eos_cap": 3}, 3)):
        source = stream(manifest, **keys)
        rows, length_B = source.rows(range(40)), source.row_lengths(range(40))
        dialogue_B = (rows.tokens_BL != EOS) & (rows.tokens_BL != PAD)
        np.testing.assert_array_equal(length_B, np.minimum(L, dialogue_B.sum(axis=1) + least))
        assert not rows.is_maskable_BL[np.arange(L) >= length_B[:, None]].any() or not keys
    assert set(stream(manifest, rows="packed").row_lengths(range(40)).tolist()) == {L}


@pytest.mark.parametrize("data_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_every_split_sees_the_same_rows_of_one_length(manifest: Manifest, data_size: int, micro_batch: int) -> None:
    config = variant(data={"chat": ChatConfig(length_multiple=4, group_by_length=8)})
    source = DialogueStream(manifest, config.data.chat, seed=5, seq_length=L)
    lengths = set()
    for first in range(0, 160, 8):
        length = row_length_at(config, first, 8, source)
        longest = int(source.row_lengths(range(first, first + 8)).max())
        assert longest <= length < longest + 4 and length % 4 == 0
        whole = source.rows(range(first, first + 8))
        ranks = [
            micro_batches(
                source, BatchPosition(first, 8), micro_batch, data_rank=rank, data_size=data_size, length=length
            )
            for rank in range(data_size)
        ]
        for batch in (batch for rank in ranks for batch in rank):
            slots = batch.sample_index_B - first
            np.testing.assert_array_equal(batch.tokens_BL, whole.tokens_BL[slots, :length])
            np.testing.assert_array_equal(batch.is_maskable_BL, whole.is_maskable_BL[slots, :length])
            assert all(cuts[-1] == length for cuts in batch.cu_seqlens or [])
            assert batch.seen_apart() is None, "all is answered <eos>"
        lengths.add(length)
    assert len(lengths) > 2, "not all batches are as long as the longest dialogue"


def test_a_dialogue_longer_than_a_row_is_named(tmp_path: Path) -> None:
    dialogues = random_dialogues(20, longest=L)
    dialogues[13] = dialogues[17] = (list(range(4, 54)), [(10, 50)])
    corpus = write_chat_corpus(tmp_path / "corpus", dialogues, shard_tokens=100)
    line = too_long(corpus, document_lengths(corpus), L)
    assert line is not None and "\n" not in line and "(and 1 more)" in line
    with pytest.raises(
        ValueError, match=r"document \d of shard-00000\d.tar has 50 tokens, more than data\.seq_length 32"
    ):
        stream(corpus)
    assert too_long(corpus, document_lengths(corpus), 50) is None


@pytest.mark.parametrize("keys", [{}, {"rows": "packed"}])
def test_damage_is_a_gap_or_an_error(tmp_path: Path, keys: dict[str, Any]) -> None:
    corpus = write_chat_corpus(tmp_path / "corpus", random_dialogues(12, longest=L), shard_tokens=10**6)
    sound = stream(corpus, **keys)
    index = range(sound.rows_per_epoch)
    before = sound.rows(index)
    flip_byte(tmp_path / "corpus" / corpus.shards[0].name, 512 + 1)
    with pytest.raises(ShardError, match="document 0"):
        stream(corpus, **keys).rows(index)
    going_on = DialogueStream(corpus, ChatConfig(**keys), seed=5, seq_length=L, keep_going=True)
    after = going_on.rows(index)
    (damaged,) = after.damaged
    assert (damaged.shard, damaged.document) == (corpus.shards[0].name, 0)
    changed = before.tokens_BL != after.tokens_BL
    assert set(after.tokens_BL[changed].tolist()) == {PAD} and not after.is_maskable_BL[changed].any()
    assert len(set(np.flatnonzero(changed.any(axis=1)))) == 1
    np.testing.assert_array_equal(before.is_maskable_BL[~changed], after.is_maskable_BL[~changed])
    # A resumed run leaves it out without looking.
    told = stream(corpus, **keys)
    told.quarantine([damaged])
    np.testing.assert_array_equal(told.rows(index).tokens_BL, after.tokens_BL)


def test_grouping_makes_batches_of_similar_length(tmp_path: Path) -> None:
    corpus = write_chat_corpus(tmp_path / "corpus", random_dialogues(640, longest=L), shard_tokens=10**6)

    def places(**keys: Any) -> int:
        source = stream(corpus, **keys)
        return sum(int(source.row_lengths(range(first, first + 8)).max()) for first in range(0, 640, 8))

    assert places(group_by_length=8) < 0.7 * places()


def test_validation_scores_answers_and_one_eos_however_training_pads(manifest: Manifest) -> None:
    rows = validation_rows(
        manifest, ChatConfig(rows="packed", eos_padding="answer", eos_cap=5), seq_length=64, count=20
    )
    dialogues = {tuple(tokens): runs for tokens, runs in all_dialogues(manifest)}
    assert len(rows.tokens_BL) == 20 and rows.tokens_BL.shape[1] <= L + 1
    for b in range(20):
        (tokens, places), *rest = pieces(rows, b)
        assert (tokens, places) == expected((tokens[:-1], dialogues[tuple(tokens[:-1])]), 1)
        assert not rest or rest[0][1] == []
    ignoring = validation_rows(manifest, ChatConfig(eos_padding="ignore"), seq_length=64, count=10**6, unit=16)
    assert ignoring.tokens_BL.shape == (DOCUMENTS, 32)
    assert ignoring.is_maskable_BL.sum() == manifest.answer_tokens


def test_mixtures_of_dialogues_and_text(manifest: Manifest, tmp_path: Path, write_tokens: WriteCorpus) -> None:
    other = write_chat_corpus(tmp_path / "other", random_dialogues(10, longest=L, seed=1))
    text = write_tokens([[*range(4, 43)]] * 20, name="text")
    points = [CorpusConfig(name, 1.0) for name in ("chat", "other", "text")]
    chats = open_stream(DataConfig(train=points[:2], seq_length=L), [manifest, other], seed=1)
    assert isinstance(chats, MixtureStream) and chats.is_ragged
    rows = chats.rows(range(20))
    np.testing.assert_array_equal(chats.row_lengths(range(20))[::2], chats.streams[0].row_lengths(range(10)))
    np.testing.assert_array_equal(rows.tokens_BL[1::2], chats.streams[1].rows(range(10)).tokens_BL)
    assert chats.state(0)["data.chat.rows"] == "padded"
    mixed = open_stream(DataConfig(train=points[::2], seq_length=L), [manifest, text], seed=1)
    rows = mixed.rows(range(20))
    assert rows.is_maskable_BL[1::2].all() and not rows.is_maskable_BL[::2].all()
    assert mixed.row_lengths(range(8)).max() == L and mixed.state(0)["window_shards"] == 8


def test_order_depends_on_what_the_state_says(manifest: Manifest) -> None:
    assert stream(manifest).state(0) == stream(manifest, eos_padding="answer", length_multiple=8).state(0)
    for keys in ({"eos_padding": "one"}, {"eos_cap": 2}, {"group_by_length": 4}, {"rows": "packed"}):
        assert stream(manifest).state(0) != stream(manifest, **keys).state(0)


def test_only_padding_is_hidden_from_attention(manifest: Manifest, write_tokens: WriteCorpus) -> None:
    text = write_tokens([[*range(4, 43)]] * 20, name="text")
    points = [CorpusConfig("chat", 1.0), CorpusConfig("text", 1.0)]
    data = DataConfig(train=points, seq_length=L, chat=ChatConfig(eos_padding="one"))
    (batch,) = micro_batches(
        open_stream(data, [manifest, text], seed=1), BatchPosition(0, 8), 8, data_rank=0, data_size=1, length=24
    )
    boundaries = batch.seen_apart()
    assert boundaries is not None
    for b in range(8):
        end = int((batch.tokens_BL[b] != PAD).sum())
        assert boundaries[b].tolist() == ([0, 24] if end == 24 else [0, end, 24])
    assert all(len(cuts) == 2 for cuts in boundaries[1::2]), "documents of a text see each other"

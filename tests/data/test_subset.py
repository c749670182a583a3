"""`max_tokens`: which documents are taken, that each epoch serves each of them once, and that nothing else is read."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_md.batch import BatchPosition
from megatron_md.config import ChatConfig, CorpusConfig, DataConfig
from megatron_md.data.cache import Cache
from megatron_md.data.chat_rows import DialogueStream
from megatron_md.data.mixture import open_stream
from megatron_md.data.shards import Manifest, ShardReader, load_manifest
from megatron_md.data.stream import SequenceStream, micro_batches
from megatron_md.data.subset import Subset, choose
from megatron_md.data.survey import token_counts
from megatron_md.errors import UserError
from tests.data.file_server import file_server
from tests.data.small_chat import all_dialogues, random_dialogues, write_chat_corpus
from tests.data.small_corpus import EOS, PAD, WriteCorpus, all_documents, flip_byte, random_documents

L = 32


@pytest.fixture
def corpus(write_tokens: WriteCorpus) -> Manifest:
    manifest = write_tokens(random_documents(300), shard_tokens=700, block_bytes=500)
    assert len(manifest.shards) > 9
    return manifest


def stream(manifest: Manifest, max_tokens: int | None, **keys: int) -> SequenceStream:
    options = {"seed": 11, "seq_length": L, "window_shards": 3, **keys}
    return SequenceStream(manifest, max_tokens=max_tokens, **options)


def numbers(manifest: Manifest, subset: Subset) -> list[int]:
    """Documents of the corpus that were taken, counted through all of it."""
    sizes = [shard.documents for shard in manifest.shards]
    return subset.numbers(range(len(sizes)), sizes).tolist()


@pytest.mark.parametrize("most", [1, 33, 699, 700, 701, 1500, 4000, 8000])
def test_an_epoch_serves_every_token_that_was_chosen_exactly_once(corpus: Manifest, most: int) -> None:
    if most == 1:
        with pytest.raises(UserError, match=r"max_tokens 1: the first document of .* has \d+: raise it to that"):
            choose(corpus, most)
        return
    cut, documents = stream(corpus, most), all_documents(corpus)
    chosen = [documents[number] for number in numbers(corpus, cut.subset)]
    assert most - max(map(len, documents)) < cut.subset.tokens == sum(map(len, chosen)) <= most
    assert cut.subset.documents == len(chosen) and len(set(numbers(corpus, cut.subset))) == len(chosen)
    expected = Counter(itertools.chain(*chosen, [EOS] * len(chosen)))
    for epoch in range(3):
        rows = cut.rows(range(epoch * cut.rows_per_epoch, (epoch + 1) * cut.rows_per_epoch))
        assert Counter(rows.tokens_BL[rows.is_maskable_BL].tolist()) == expected
    assert cut.rows_per_epoch == -(-(cut.subset.tokens + len(chosen)) // L)


def test_whole_documents_are_chosen_once_each_and_epochs_differ_in_their_order(write_tokens: WriteCorpus) -> None:
    manifest = write_tokens([[10 + number] * 3 for number in range(90)], shard_tokens=60)
    cut = stream(manifest, 100, seq_length=400)
    first, second = cut.rows([0]), cut.rows([1])
    words = [first.tokens_BL[0][begin:stop].tolist() for begin, stop in itertools.pairwise(first.cu_seqlens[0])][:-1]
    assert sorted(words) == [[10 + number] * 3 + [EOS] for number in numbers(manifest, cut.subset)] and len(words) == 33
    assert first.tokens_BL.tolist() != second.tokens_BL.tolist()
    assert Counter(first.tokens_BL[0].tolist()) == Counter(second.tokens_BL[0].tolist())


def test_fewer_tokens_are_a_part_of_more_and_seeds_share_them(corpus: Manifest) -> None:
    before: set[int] = set()
    for most in range(100, corpus.tokens, 97):
        chosen = numbers(corpus, choose(corpus, most))
        assert before <= set(chosen)
        before = set(chosen)
        other = stream(corpus, most, seed=most, window_shards=1 + most % 3)
        assert numbers(corpus, other.subset) == chosen
    assert len(before) > 290


def test_all_tokens_are_the_corpus_itself_and_more_are_refused(corpus: Manifest) -> None:
    whole, same = stream(corpus, None), stream(corpus, corpus.tokens)
    g = range(2 * whole.rows_per_epoch)
    assert (whole.rows(g).tokens_BL == same.rows(g).tokens_BL).all()
    with pytest.raises(UserError, match=rf"max_tokens {corpus.tokens + 1} is more than the {corpus.tokens} of"):
        choose(corpus, corpus.tokens + 1)


def test_only_shards_that_are_taken_are_read(corpus: Manifest) -> None:
    taken = choose(corpus, 1500).shards.tolist()
    for number, shard in enumerate(corpus.shards):
        if number not in taken:
            (corpus.directory / shard.name).unlink()
            (corpus.directory / shard.index).unlink()
    cut = stream(corpus, 1500)
    assert len(taken) == 3 and cut.rows(range(3 * cut.rows_per_epoch)).damaged == frozenset()


@pytest.mark.parametrize(("data_size", "micro_batch_size"), [(1, 8), (2, 2), (4, 1)])
def test_every_layout_sees_the_same_rows(corpus: Manifest, data_size: int, micro_batch_size: int) -> None:
    cut = stream(corpus, 1500)
    for first in (0, cut.rows_per_epoch - 3):  # the second goes on into the next epoch
        parts = [
            micro_batches(cut, BatchPosition(first, 8, 0.0), micro_batch_size, data_rank=rank, data_size=data_size)
            for rank in range(data_size)
        ]
        rows = {
            int(g): row for ranks in parts for b in ranks for g, row in zip(b.sample_index_B, b.tokens_BL, strict=True)
        }
        expected = stream(corpus, 1500).rows(range(first, first + 8)).tokens_BL
        assert (np.array([rows[g] for g in range(first, first + 8)]) == expected).all()


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_dialogues_are_chosen_whole_and_served_once_per_epoch(tmp_path: Path, layout: str) -> None:
    manifest = write_chat_corpus(tmp_path / "chat", random_dialogues(120))
    dialogues, most = all_dialogues(manifest), manifest.tokens // 3
    chat = ChatConfig(rows=layout, eos_padding="ignore")
    cut = DialogueStream(manifest, chat, seed=3, seq_length=64, max_tokens=most)
    chosen = [dialogues[number][0] for number in numbers(manifest, cut.subset)]
    assert most - 30 < cut.subset.tokens == sum(map(len, chosen)) <= most
    for epoch in range(2):
        rows = cut.rows(range(epoch * cut.rows_per_epoch, (epoch + 1) * cut.rows_per_epoch))
        served = [
            row[begin:stop].tolist()
            for row, cuts in zip(rows.tokens_BL, rows.cu_seqlens, strict=True)
            for begin, stop in itertools.pairwise(cuts)
        ]
        assert sorted(document for document in served if document[0] != PAD) == sorted(chosen)
    other = DialogueStream(manifest, chat, seed=4, seq_length=64, max_tokens=most)
    assert numbers(manifest, other.subset) == numbers(manifest, cut.subset)


def test_corpora_of_a_mixture_are_cut_one_by_one_and_states_tell_them_apart(
    corpus: Manifest, write_tokens: WriteCorpus
) -> None:
    other = write_tokens(random_documents(80, seed=5), name="other")
    paths = [str(corpus.directory), str(other.directory)]
    cut, whole = CorpusConfig(paths[0], 1.0, max_tokens=900), CorpusConfig(paths[1], 1.0)
    config = DataConfig(train=[cut, whole], seq_length=L)
    mixture = open_stream(config, [corpus, other], seed=7)
    sizes = [one.subset.tokens for one in mixture.streams]
    assert sizes[0] <= 900 and sizes[1] == other.tokens
    assert mixture.schedule.served(11) == np.bincount(mixture.schedule.locate(range(11))[0]).tolist()
    assert mixture.state(4)["corpus"][0] == {"corpus": corpus.sha256, "weight": [[0, 1.0]], "max_tokens": 900}
    assert "max_tokens" not in mixture.state(4)["corpus"][1] and mixture.state(4)["data.max_tokens"] is None
    single = open_stream(replace(config, train=paths[0], max_tokens=900), [corpus], seed=7)
    assert single.state(4)["data.max_tokens"] == 900
    assert single.rows([0, 5]).tokens_BL.tolist() == mixture.streams[0].rows([0, 5]).tokens_BL.tolist()


def test_the_unigram_entropy_is_that_of_what_is_served(corpus: Manifest) -> None:
    cut = stream(corpus, 1500)
    rows = cut.rows(range(cut.rows_per_epoch))
    served = np.bincount(rows.tokens_BL[rows.is_maskable_BL], minlength=corpus.vocab_size)
    np.testing.assert_array_equal(token_counts(corpus, 1500), served)


def test_of_a_remote_corpus_only_shards_that_are_taken_are_fetched(
    corpus: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with file_server(tmp_path) as server:
        far = load_manifest(f"{server.url}/{corpus.directory.name}", cache=Cache(tmp_path / "cache", 10**8))
        cut, near = stream(far, 1500), stream(corpus, 1500)
        g = range(3 * near.rows_per_epoch)
        assert (cut.rows(g).tokens_BL == near.rows(g).tokens_BL).all()
        asked = {Path(path).name for path in server.requests}
    taken = [corpus.shards[number] for number in near.subset.shards]
    assert asked == {"manifest.json", *(shard.name for shard in taken), *(shard.index for shard in taken)}


def test_damage_is_named_by_the_documents_number_in_its_shard(corpus: Manifest) -> None:
    subset = stream(corpus, 1500).subset
    assert subset.part is not None
    shard, part = subset.part
    reader = ShardReader(corpus, shard)
    lengths, offsets = reader.index["tokens"].tolist(), reader.index["offset"].tolist()
    taken = next(number for number in part.tolist() if lengths[number] > 20)
    left = next(number for number in range(len(lengths)) if number not in part and lengths[number] > 20)
    for number in (taken, left):
        flip_byte(reader.path, offsets[number] + 2)
    cut = stream(corpus, 1500, keep_going=True)
    rows = cut.rows(range(cut.rows_per_epoch))
    assert {(damaged.shard, damaged.document) for damaged in rows.damaged} == {(corpus.shards[shard].name, taken)}
    assert rows.is_maskable_BL.sum() == subset.tokens + subset.documents - lengths[taken] - 1

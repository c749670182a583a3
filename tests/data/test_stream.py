"""The stream: every token once per epoch, one order for any layout and restart, damage named, reading ahead."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import time
import tracemalloc
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_md.batch import BatchPosition, DamagedDocument, Rows
from megatron_md.data.packing import RowOrder
from megatron_md.data.shard_index import INDEX_DTYPE
from megatron_md.data.shards import FORMAT, Manifest, ShardError, ShardReader, content_hash, load_manifest
from megatron_md.data.stream import SequenceStream, micro_batches, validation_rows
from tests.data.small_corpus import EOS, PAD, WriteCorpus, random_documents

L = 32


def stream(manifest: Manifest, **keys: int) -> SequenceStream:
    return SequenceStream(manifest, **{"seed": 11, "seq_length": L, "window_shards": 3, **keys})


def many_windows(write_tokens: WriteCorpus) -> Manifest:
    manifest = write_tokens(random_documents(300), shard_tokens=700, block_bytes=500)
    assert len(manifest.shards) > 9
    return manifest


CORPORA = {
    "many windows": (random_documents(300), {"shard_tokens": 700, "block_bytes": 500}),
    "one document per shard": ([d for d in random_documents(30) if d], {"shard_tokens": 1}),
    "documents longer than L": (random_documents(8, longest=20 * L, seed=1), {"shard_tokens": 400}),
    "documents of one token": ([[number] for number in range(10, 150)], {"shard_tokens": 40}),
    "with empty documents": ([[], [7], [], [], list(range(10, 90)), []], {}),
    "fewer shards than a window": (random_documents(40), {}),
    "large vocabulary": (random_documents(40, vocab_size=100_000), {"vocab_size": 100_000, "shard_tokens": 200}),
    "one row in all": ([[5, 6, 7]], {}),
}


@pytest.mark.parametrize("name", CORPORA)
def test_every_document_appears_exactly_once_per_epoch(write_tokens: WriteCorpus, name: str) -> None:
    documents, sizes = CORPORA[name]
    manifest = write_tokens(documents, **sizes)
    rows = stream(manifest).rows(range(stream(manifest).rows_per_epoch))
    served = rows.tokens_BL[rows.is_maskable_BL]
    assert Counter(served.tolist()) == Counter(itertools.chain(*documents, [EOS] * len(documents)))
    assert (rows.tokens_BL[~rows.is_maskable_BL] == PAD).all()
    assert len(served) == manifest.tokens + manifest.documents


@pytest.mark.parametrize("name", CORPORA)
def test_boundaries_mark_the_documents(write_tokens: WriteCorpus, name: str) -> None:
    documents, sizes = CORPORA[name]
    manifest = write_tokens(documents, **sizes)
    rows = stream(manifest).rows(range(2 * stream(manifest).rows_per_epoch))
    for tokens, is_maskable, cu_seqlens in zip(rows.tokens_BL, rows.is_maskable_BL, rows.cu_seqlens, strict=True):
        used = int(is_maskable.sum())
        assert is_maskable[:used].all()
        after_eos = np.flatnonzero(tokens[:used] == EOS) + 1
        assert cu_seqlens.tolist() == sorted({0, *after_eos.tolist(), used, L})


def test_whole_documents_stand_in_the_rows_as_they_were_written(write_tokens: WriteCorpus) -> None:
    documents = [[10 + number] * 3 + list(range(10, 10 + number)) for number in range(12)]
    rows = stream(write_tokens(documents), seq_length=400).rows([0])
    cuts = rows.cu_seqlens[0].tolist()
    found = [rows.tokens_BL[0, a:b].tolist() for a, b in itertools.pairwise(cuts)][: len(documents)]
    assert sorted(found) == sorted([*tokens, EOS] for tokens in documents)
    assert found != [[*tokens, EOS] for tokens in documents]


def test_epochs_and_seeds_have_other_orders(write_tokens: WriteCorpus) -> None:
    manifest = many_windows(write_tokens)
    epoch = stream(manifest).rows_per_epoch
    first = stream(manifest).rows(range(50)).tokens_BL
    assert (first != stream(manifest, seed=12).rows(range(50)).tokens_BL).mean() > 0.9
    assert (first != stream(manifest).rows(range(epoch, epoch + 50)).tokens_BL).mean() > 0.9
    np.testing.assert_array_equal(first, stream(manifest).rows(range(50)).tokens_BL)


def test_rows_that_run_on_into_the_next_window_hold_both_parts(write_tokens: WriteCorpus) -> None:
    documents = [[10 + number] * (5 + 3 * number) for number in range(40)]
    manifest = write_tokens(documents, shard_tokens=150)
    rows = stream(manifest, window_shards=1).rows(range(stream(manifest).rows_per_epoch))
    assert len(manifest.shards) > 9 and (~rows.is_maskable_BL).sum() == -(manifest.tokens + 40) % L
    # Each document is one run of equal tokens, so parts of rows that were put together wrongly would split one.
    found = Counter[int]()
    for tokens, cuts in zip(rows.tokens_BL, rows.cu_seqlens, strict=True):
        for begin, end in itertools.pairwise(cuts.tolist()):
            assert len(set(tokens[begin : end - 1].tolist())) <= 1
            found.update(tokens[begin:end].tolist())
    assert all(found[document[0]] == len(document) for document in documents)


def digest(manifest: Manifest, data_size: int, micro_batch_size: int, first: int, batches: int) -> list[str]:
    """One hash per global batch of 16 rows, put together from the ranks' micro-batches, each rank with its stream."""
    ranks = [stream(manifest) for _ in range(data_size)]
    digests = []
    for number in range(batches):
        position = BatchPosition(first + 16 * number, 16)
        parts = [
            micro_batches(s, position, micro_batch_size, data_rank=r, data_size=data_size) for r, s in enumerate(ranks)
        ]
        # Slot order: micro-batch j of rank 0, of rank 1, …, then micro-batch j + 1.
        ordered = [part for group in zip(*parts, strict=True) for part in group]
        assert np.concatenate([part.sample_index_B for part in ordered]).tolist() == [
            *range(first + 16 * number, first + 16 * number + 16)
        ]
        assert all(part.position == position for part in ordered)
        tokens, is_maskable = (
            np.concatenate([getattr(p, k) for p in ordered]) for k in ("tokens_BL", "is_maskable_BL")
        )
        digests.append(hashlib.sha256(tokens.tobytes() + is_maskable.tobytes()).hexdigest())
    return digests


def test_global_batches_are_the_same_for_any_layout_and_restart(write_tokens: WriteCorpus) -> None:
    manifest = many_windows(write_tokens)
    reference = digest(manifest, 1, 16, first=0, batches=50)
    assert len(set(reference)) == 50 and 2 * stream(manifest).rows_per_epoch < 50 * 16
    for data_size, micro_batch_size in [(1, 2), (2, 1), (4, 4)]:
        assert digest(manifest, data_size, micro_batch_size, first=0, batches=50) == reference
    for step in [1, 7, 33]:
        assert digest(manifest, 2, 4, first=16 * step, batches=50 - step) == reference[step:]


@pytest.mark.parametrize("name", CORPORA)
def test_eight_ranks_see_what_one_sees_whatever_the_shards(write_tokens: WriteCorpus, name: str) -> None:
    documents, sizes = CORPORA[name]
    manifest = write_tokens(documents, **sizes)
    assert digest(manifest, 8, 2, first=48, batches=3) == digest(manifest, 1, 16, first=48, batches=3)


def test_indivisible_global_batch_is_refused(write_tokens: WriteCorpus) -> None:
    with pytest.raises(ValueError, match=r"global_batch_size 12 is not a multiple of train.micro_batch_size 4 x .* 2"):
        micro_batches(stream(write_tokens([[5]])), BatchPosition(0, 12), 4, data_rank=0, data_size=2)


def test_state_tells_streams_apart(write_tokens: WriteCorpus) -> None:
    manifest = write_tokens([[5]])
    assert stream(manifest).state(7) == stream(manifest).state(8)
    for keys in [{"seed": 12}, {"seq_length": 8}, {"window_shards": 4}]:
        assert stream(manifest).state(7) != stream(manifest, **keys).state(7)
    assert stream(manifest).state(7) != stream(write_tokens([[6]], name="other")).state(7)


def test_validation_rows_are_fixed_and_distinct(write_tokens: WriteCorpus) -> None:
    manifest = many_windows(write_tokens)
    few, every = validation_rows(manifest, L, 20), validation_rows(manifest, L, 10**9)
    np.testing.assert_array_equal(few.tokens_BL, every.tokens_BL[:20])
    assert int(every.is_maskable_BL.sum()) == manifest.tokens + manifest.documents
    assert len(np.unique(every.sample_index_B)) == len(every.tokens_BL)


def test_damaged_document_is_named_when_a_row_needs_it(write_tokens: WriteCorpus, tmp_path: Path) -> None:
    manifest = write_tokens([[10] * 8, [11] * 8, [12] * 8], shard_tokens=16)
    offset = int(ShardReader(manifest, 0).index["offset"][1])
    path = tmp_path / "corpus" / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[offset + 3] ^= 1
    path.write_bytes(data)
    epoch = range(stream(manifest, seq_length=9).rows_per_epoch)
    with pytest.raises(ShardError, match=r"shard-000000\.tar: document 1 \(bytes \d+ to \d+\) is damaged"):
        stream(manifest, seq_length=9).rows(epoch)
    damaged = 0
    for g in epoch:
        try:
            stream(manifest, seq_length=9).rows([g])
        except ShardError:
            damaged += 1
    assert damaged == 1


def cut_and_read_on(manifest: Manifest, keep_going: bool) -> str | Rows:
    """Cut the corpus' only shard in two while a stream reads it; the error, or all rows."""
    shard = manifest.directory / manifest.shards[0].name
    cut = SequenceStream(manifest, seed=11, seq_length=L, keep_going=keep_going)
    cut.rows([0])
    os.truncate(shard, manifest.shards[0].bytes // 2)
    try:
        return cut.rows(range(cut.rows_per_epoch))
    except ShardError as error:
        return str(error)


def test_a_shard_that_is_cut_while_it_is_read_is_damaged_as_any_other(write_tokens: WriteCorpus) -> None:
    """In a process of its own, which a mapping of the file would end by a bus error."""
    corpora = [write_tokens(random_documents(2000), name=name, shard_tokens=10**6) for name in ("stop", "go on")]
    half = corpora[0].shards[0].bytes // 2
    index = ShardReader(corpora[0], 0).index
    lost = set(np.flatnonzero((index["offset"] + 2 * index["tokens"] > half) & (index["tokens"] > 0)).tolist())
    assert 100 < len(lost) < 1900
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        error, rows = pool.map(cut_and_read_on, corpora, (False, True), timeout=120)
    end = rf"is damaged: the file ends at byte {half}; restore the shard$"
    assert isinstance(error, str) and re.search(rf"shard-000000\.tar: document \d+ \(bytes .* {end}", error)
    assert isinstance(rows, Rows) and {damaged.document for damaged in rows.damaged} == lost


def damage(manifest: Manifest, wanted: int, seed: int = 0) -> set[DamagedDocument]:
    """Flip a byte in that many documents of different shards."""
    random = np.random.default_rng(seed)
    damaged = set()
    for number in random.permutation(len(manifest.shards))[:wanted].tolist():
        shard = manifest.shards[number]
        index = ShardReader(manifest, number).index
        document = int(random.choice(np.flatnonzero(index["tokens"])))
        path = manifest.directory / shard.name
        data = bytearray(path.read_bytes())
        data[int(index["offset"][document])] ^= 0x80
        path.write_bytes(data)
        damaged.add(DamagedDocument(manifest.sha256, shard.name, document, int(index["tokens"][document])))
    return damaged


@pytest.mark.parametrize("name", CORPORA)
def test_damaged_documents_leave_gaps_and_nothing_moves(write_tokens: WriteCorpus, name: str) -> None:
    documents, sizes = CORPORA[name]
    manifest = write_tokens(documents, **sizes)
    epoch = range(stream(manifest).rows_per_epoch)
    sound = stream(manifest).rows(epoch)
    damaged = damage(manifest, wanted=5)
    rows = stream(manifest, keep_going=True).rows(epoch)
    assert rows.damaged == damaged
    # Served + quarantined = the manifest's total, each with an <eos> per document.
    gap = sum(document.tokens + 1 for document in damaged)
    assert rows.is_maskable_BL.sum() + gap == manifest.tokens + manifest.documents == sound.is_maskable_BL.sum()
    kept = rows.is_maskable_BL
    assert not (kept & ~sound.is_maskable_BL).any()
    np.testing.assert_array_equal(rows.tokens_BL[kept], sound.tokens_BL[kept])
    assert (rows.tokens_BL[~kept] == PAD).all()
    for mine, theirs in zip(rows.cu_seqlens, sound.cu_seqlens, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_known_damage_stays_left_out_after_a_repair(write_tokens: WriteCorpus) -> None:
    manifest = many_windows(write_tokens)
    before = {shard.name: (manifest.directory / shard.name).read_bytes() for shard in manifest.shards}
    damaged = damage(manifest, wanted=4)
    broken = stream(manifest, keep_going=True).rows(range(100))
    for name, data in before.items():
        (manifest.directory / name).write_bytes(data)
    resumed = stream(manifest, keep_going=True)
    assert not resumed.rows(range(100)).damaged
    resumed.quarantine([*damaged, DamagedDocument("another corpus", manifest.shards[0].name, 0, 1)])
    again = resumed.rows(range(100))
    np.testing.assert_array_equal(again.tokens_BL, broken.tokens_BL)
    np.testing.assert_array_equal(again.is_maskable_BL, broken.is_maskable_BL)
    assert again.damaged == broken.damaged and again.damaged


def test_gaps_are_the_same_for_any_layout(write_tokens: WriteCorpus) -> None:
    manifest = many_windows(write_tokens)
    damage(manifest, wanted=6)
    whole = micro_batches(stream(manifest, keep_going=True), BatchPosition(0, 64), 64, data_rank=0, data_size=1)[0]
    assert (~whole.is_maskable_BL).sum() > 0 and whole.damaged
    parts = [
        micro_batches(stream(manifest, keep_going=True), BatchPosition(0, 64), 16, data_rank=rank, data_size=4)[0]
        for rank in range(4)
    ]
    np.testing.assert_array_equal(np.concatenate([part.is_maskable_BL for part in parts]), whole.is_maskable_BL)
    assert frozenset().union(*(part.damaged for part in parts)) == whole.damaged


def test_rows_can_be_cut_to_a_length(write_tokens: WriteCorpus) -> None:
    manifest = many_windows(write_tokens)
    position = BatchPosition(32, 16)
    whole, cut = (
        micro_batches(stream(manifest), position, 16, data_rank=0, data_size=1, length=length)[0] for length in (L, 12)
    )
    assert cut.tokens_BL.shape == (16, 12) and cut.position == position
    np.testing.assert_array_equal(cut.tokens_BL, whole.tokens_BL[:, :12])
    np.testing.assert_array_equal(cut.is_maskable_BL, whole.is_maskable_BL[:, :12])
    assert whole.cu_seqlens is not None and cut.cu_seqlens is not None
    for short, long in zip(cut.cu_seqlens, whole.cu_seqlens, strict=True):
        assert short.tolist() == [*(long[long < 12]).tolist(), 12]


SHARDS, SHARD_DOCUMENTS, SHARD_BYTES = 60_000, 16_384, 1 << 25


@pytest.mark.slow
def test_a_trillion_tokens_open_at_any_row_in_bounded_memory(tmp_path: Path) -> None:
    """60,000 shards of 16.7M tokens: only the manifest is complete, and the files of the windows that are opened."""
    lengths = np.full(SHARD_DOCUMENTS, 1024, dtype="<u4")
    index = np.zeros(SHARD_DOCUMENTS, dtype=INDEX_DTYPE)
    index["tokens"], index["offset"] = lengths, 512 + np.arange(SHARD_DOCUMENTS) * 2048
    index["crc32"] = zlib.crc32(bytes(2048))
    buffer = io.BytesIO()
    np.save(buffer, index)
    size = SHARD_BYTES + 10_240
    shard = {"documents": SHARD_DOCUMENTS, "tokens": int(lengths.sum()), "bytes": size, "sha256": "0" * 64,
             "index_sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}  # fmt: skip
    shards = [{"name": f"shard-{n:06d}.tar", "index": f"shard-{n:06d}.index.npy", **shard} for n in range(SHARDS)]
    content = {"format": FORMAT, "version": 1, "dtype": "uint16", "vocab_size": 100, "eos_id": EOS, "mask_id": 3,
               "pad_id": PAD, "tokenizer_sha256": "0" * 64, "documents": SHARDS * SHARD_DOCUMENTS,
               "tokens": SHARDS * shard["tokens"], "text_bytes": 0, "source": {}, "shards": shards}  # fmt: skip
    content["sha256"] = content_hash(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    order = RowOrder(np.full(SHARDS, shard["tokens"] + SHARD_DOCUMENTS), seq_length=4096, window_shards=8, seed=11,
                     corpus=content["sha256"])  # fmt: skip
    some_g = [123_456_789, 10 * 1024, 10_000 * 1024]
    for g in some_g:
        place = order.locate(g)
        windows = [order.shards_of_window(place.epoch, span.window) for span in place.spans]
        for number in np.concatenate(windows).tolist():
            (tmp_path / shards[number]["index"]).write_bytes(buffer.getvalue())
            with (tmp_path / shards[number]["name"]).open("wb") as file:
                file.truncate(size)
    del shards, content, order
    tracemalloc.start()
    opened = SequenceStream(load_manifest(tmp_path, check_files=False), seed=11, seq_length=4096)
    at_rest = tracemalloc.get_traced_memory()[0]
    for g in some_g:
        assert opened.rows([g]).is_maskable_BL.sum() > 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    clocks = (time.perf_counter, time.process_time)  # other processes of the machine hardly change the second
    start = [clock() for clock in clocks]
    manifest = load_manifest(tmp_path, check_files=False)
    seconds = [[clock() - at for clock, at in zip(clocks, start, strict=True)]]
    for g in some_g:
        start = [clock() for clock in clocks]
        SequenceStream(manifest, seed=11, seq_length=4096).rows([g])
        seconds.append([clock() - at for clock, at in zip(clocks, start, strict=True)])
    print(f"{manifest.tokens / 1e12:.2f}T tokens, seconds and CPU seconds:")
    for name, (wall, cpu) in zip(("manifest", "a random row", "step 10", "step 10,000"), seconds, strict=True):
        print(f"{name}: {wall:.2f}, {cpu:.2f}")
    print(f"{at_rest / 2**20:.0f} MiB at rest, {peak / 2**20:.0f} MiB at most")
    assert at_rest < 128 * 2**20 and peak < 512 * 2**20


def test_shard_cut_after_opening_is_named(write_tokens: WriteCorpus, tmp_path: Path) -> None:
    opened = stream(many_windows(write_tokens))
    for path in (tmp_path / "corpus").glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-1024])
    with pytest.raises(ShardError, match=r"shard-\d+\.tar: \d+ bytes instead of \d+"):
        opened.rows([0])

"""The cache: every file fetched once per node, never served damaged, never over its cap, never evicted in use."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from io import BufferedReader
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megatron_md.config import DataConfig, config_from_mapping
from megatron_md.data import remote
from megatron_md.data.cache import Cache, _exclusive, default_directory
from megatron_md.data.remote import RemoteError, RemoteFile
from megatron_md.data.shards import Manifest, ShardError, ShardReader, content_hash, load_manifest
from megatron_md.data.stream import SequenceStream
from megatron_md.data.survey import unigram_entropy, verify_corpus
from megatron_md.run.check import resolve_config
from megatron_md.run.check_corpora import corpus_problems, missing_files
from tests.data.file_server import FileServer, file_server
from tests.data.small_corpus import WriteCorpus, all_documents, random_documents

L, W = 32, 3
ROOM = 10_000_000


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)


@pytest.fixture
def manifest(write_tokens: WriteCorpus) -> Manifest:
    manifest = write_tokens(random_documents(300), shard_tokens=700, block_bytes=500)
    assert len(manifest.shards) > 3 * W
    return manifest


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    with file_server(tmp_path) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", ROOM)


def stream(manifest: Manifest, **keys: int) -> SequenceStream:
    return SequenceStream(manifest, **{"seed": 11, "seq_length": L, "window_shards": W, **keys})


def digest(manifest: Manifest) -> str:
    """Digest of an epoch and a half of rows."""
    rows = stream(manifest).rows(range(stream(manifest).rows_per_epoch * 3 // 2))
    return hashlib.sha256(rows.tokens_BL.tobytes() + np.concatenate(rows.cu_seqlens).tobytes()).hexdigest()


def digest_of_url(url: str, cache: Cache) -> str:
    return digest(load_manifest(url, cache=cache))


def held_bytes(cache: Cache) -> int:
    held = 0
    with _exclusive(cache.directory / "lock"):  # or room might be made while the files are counted
        for path in cache.directory.iterdir():
            with suppress(FileNotFoundError):
                held += path.stat().st_size
    return held


def settle(cache: Cache) -> list[str]:
    """Names in the cache when no prefetch is under way."""
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join(30)
    return sorted(path.name for path in cache.directory.iterdir())


def pieces(count: int, size: int) -> list[RemoteFile]:
    """Files of random bytes in fsspec's memory."""
    files = []
    for number in range(count):
        data = np.random.default_rng(number).bytes(size)
        fsspec.filesystem("memory").pipe(f"/pieces/{number}", data)
        files.append(RemoteFile(f"memory://pieces/{number}", size, hashlib.sha256(data).hexdigest()))
    return files


def close_all(files: list[BufferedReader]) -> None:
    for file in files:
        file.close()


def test_a_corpus_over_http_gives_the_rows_of_the_local_one(
    manifest: Manifest, server: FileServer, cache: Cache
) -> None:
    for suffix in ("", "/", "/manifest.json"):
        assert digest_of_url(f"{server.url}/corpus{suffix}", cache) == digest(manifest)
    files = {name: count for name, count in server.requests.items() if "manifest" not in name}
    assert set(files.values()) == {1}, "everything else came from the cache"
    assert len(files) == 2 * len(manifest.shards)


def test_a_corpus_in_fsspec_memory_gives_the_rows_of_the_local_one(manifest: Manifest, cache: Cache) -> None:
    for path in manifest.directory.iterdir():
        fsspec.filesystem("memory").pipe(f"/bucket/corpus/{path.name}", path.read_bytes())
    far = load_manifest("memory://bucket/corpus", cache=cache)
    assert digest(far) == digest(manifest)
    assert all_documents(far) == all_documents(manifest)
    assert verify_corpus(far) == [] and unigram_entropy(far) == unigram_entropy(manifest)


def test_faults_on_the_way_do_not_change_the_rows(
    manifest: Manifest, server: FileServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.3)
    server.faults["corpus/manifest.json"].extend(["503", "cut:200"])
    kinds = [["503", "cut:512"], ["short:1024"], ["long:5", "other"], ["stall:600"], []]
    for number, shard in enumerate(manifest.shards):
        server.faults[f"corpus/{shard.name}"].extend(kinds[number % len(kinds)])
        server.faults[f"corpus/{shard.index}"].extend(kinds[(number + 1) % len(kinds)])
    assert digest_of_url(f"{server.url}/corpus", cache) == digest(manifest)
    assert not any(server.faults.values())


def test_a_shard_that_cannot_be_had_stops_the_run_with_its_name(
    manifest: Manifest, server: FileServer, cache: Cache
) -> None:
    server.faults[f"corpus/{manifest.shards[4].name}"].extend(["cut:512"] * 1000)
    far = load_manifest(f"{server.url}/corpus", cache=cache)
    with pytest.raises(RemoteError, match=manifest.shards[4].name):
        stream(far).rows(range(stream(far).rows_per_epoch))
    names = settle(cache)
    assert manifest.shards[4].sha256 not in names and not any(name.endswith(".part") for name in names)
    assert [manifest.shards[4].name in problem for problem in verify_corpus(far)] == [True]


def test_corpora_with_equal_file_names_do_not_mix(write_tokens: WriteCorpus, server: FileServer, cache: Cache) -> None:
    corpora = [write_tokens(random_documents(60, seed=seed), name=f"corpus{seed}") for seed in (1, 2)]
    assert corpora[0].shards[0].name == corpora[1].shards[0].name
    for corpus in corpora * 2:
        far = load_manifest(f"{server.url}/{corpus.directory.name}", cache=cache)
        assert all_documents(far) == all_documents(corpus)


def test_the_processes_of_a_node_fetch_every_file_once(manifest: Manifest, server: FileServer, cache: Cache) -> None:
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        digests = list(pool.map(digest_of_url, [f"{server.url}/corpus"] * 3, [cache] * 3))
    assert digests == [digest(manifest)] * 3
    counts = Counter(server.requests)
    assert counts.pop("corpus/manifest.json") == 3
    assert set(counts.values()) == {1} and len(counts) == 2 * len(manifest.shards)
    assert set(settle(cache)) == {"lock", *(h for shard in manifest.shards for h in (shard.sha256, shard.index_sha256))}


def test_many_threads_in_a_cache_that_holds_few_files_all_read_right(cache: Cache) -> None:
    """Fetching, opening and evicting at the same time: the cap holds and no one reads anything else."""
    files, tight = pieces(12, 5000), Cache(cache.directory, 6 * 5000)

    def read(number: int) -> int:
        file = files[number % len(files)]
        with tight.open(file) as opened:
            assert hashlib.sha256(opened.read()).hexdigest() == file.sha256
            return held_bytes(tight)

    with ThreadPoolExecutor(4) as pool:
        largest = max(pool.map(read, np.random.default_rng(0).integers(0, 1000, 400).tolist()))
    assert largest <= tight.max_bytes


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer"])
def test_a_damaged_cache_file_is_noticed_and_fetched_again(
    manifest: Manifest, server: FileServer, cache: Cache, damage: str
) -> None:
    far = load_manifest(f"{server.url}/corpus", cache=cache)
    documents = all_documents(far)
    for path in (cache.directory / manifest.shards[0].sha256, cache.directory / manifest.shards[1].index_sha256):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        damaged = {"flip": data, "cut": data[: len(data) // 2], "empty": b"", "longer": path.read_bytes() + b"x"}
        path.write_bytes(damaged[damage])
    assert all_documents(far) == documents
    assert server.requests[f"corpus/{manifest.shards[0].name}"] == 2
    assert server.requests[f"corpus/{manifest.shards[1].index}"] == 2
    assert server.requests[f"corpus/{manifest.shards[1].name}"] == 1


def test_the_cap_is_kept_and_the_oldest_goes_first(cache: Cache) -> None:
    files, small = pieces(6, 1000), Cache(cache.directory, 3500)
    for number in (0, 1, 2, 0, 3):
        small.open(files[number]).close()
        time.sleep(0.002)  # modification times must differ
        assert held_bytes(small) <= 3500
    assert {path.name for path in small.directory.iterdir()} == {"lock", *(files[n].sha256 for n in (0, 2, 3))}


def test_a_file_in_use_is_never_evicted(cache: Cache) -> None:
    files, small = pieces(6, 1000), Cache(cache.directory, 3000)
    held = [small.open(file) for file in files[:2]]
    for file in files[2:]:
        small.open(file).close()
    assert all((small.directory / file.sha256).exists() for file in files[:2])
    held.append(small.open(files[2]))
    with pytest.raises(RemoteError, match=r"data\.cache_bytes 3000 cannot hold 1000 bytes more"):
        small.open(files[3])
    close_all(held)
    small.open(files[3]).close()
    assert held_bytes(small) <= 3000


def test_a_mapped_shard_stays_until_its_reader_goes(manifest: Manifest, server: FileServer, cache: Cache) -> None:
    largest = max(shard.bytes for shard in manifest.shards)
    far = load_manifest(f"{server.url}/corpus", cache=Cache(cache.directory, 2 * largest + 10_000))
    reader = ShardReader(far, 0)
    path = cache.directory / manifest.shards[0].sha256
    expected = [reader.document(d).tolist() for d in range(len(reader.index))]
    for number in range(1, len(manifest.shards)):
        ShardReader(far, number)
    assert path.exists() and [reader.document(d).tolist() for d in range(len(reader.index))] == expected
    del reader
    for number in range(1, len(manifest.shards)):
        ShardReader(far, number)
    assert not path.exists()


def test_what_a_dead_process_left_is_replaced_or_evicted(cache: Cache) -> None:
    files, small = pieces(3, 1000), Cache(cache.directory, 2500)
    cache.directory.mkdir()
    for file in files[:2]:
        (cache.directory / f"{file.sha256}.part").write_bytes(b"x" * 1200)
    with small.open(files[0]) as opened:
        assert hashlib.sha256(opened.read()).hexdigest() == files[0].sha256
    small.open(files[2]).close()
    assert held_bytes(small) <= 2500
    assert not list(cache.directory.glob("*.part"))


def test_files_of_others_in_the_folder_are_left_alone(cache: Cache) -> None:
    cache.directory.mkdir()
    (cache.directory / "notes.txt").write_bytes(b"x" * 5000)
    files, small = pieces(4, 1000), Cache(cache.directory, 2000)
    for file in files:
        small.open(file).close()
    assert (cache.directory / "notes.txt").stat().st_size == 5000


def test_a_link_in_place_of_a_download_is_not_followed(cache: Cache, tmp_path: Path) -> None:
    (file,) = pieces(1, 1000)
    (tmp_path / "precious").write_bytes(b"mine")
    cache.directory.mkdir()
    (cache.directory / f"{file.sha256}.part").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        cache.open(file)
    assert (tmp_path / "precious").read_bytes() == b"mine"


def test_a_cache_too_small_for_the_windows_is_refused_at_the_first_row(
    manifest: Manifest, server: FileServer, cache: Cache
) -> None:
    far = load_manifest(f"{server.url}/corpus", cache=Cache(cache.directory, 10_000))
    with pytest.raises(RemoteError, match=r"data\.cache_bytes 10000 is too small: 3 windows of"):
        stream(far).rows([0])


def test_a_small_cache_serves_all_epochs(manifest: Manifest, server: FileServer, cache: Cache) -> None:
    """Room for three windows only: everything is fetched and evicted again and again, and the rows stay right."""
    window = W * (max(shard.bytes for shard in manifest.shards) + 2000)
    small = Cache(cache.directory, 3 * window)
    assert sum(shard.bytes for shard in manifest.shards) > 0.9 * small.max_bytes
    assert digest_of_url(f"{server.url}/corpus", small) == digest(manifest)
    settle(small)
    assert held_bytes(small) <= small.max_bytes


def test_the_next_window_is_prefetched(manifest: Manifest, server: FileServer, cache: Cache) -> None:
    far = stream(load_manifest(f"{server.url}/corpus", cache=cache))
    far.rows([0])
    expected = {
        name
        for window in (0, 1)
        for shard in far._order.shards_of_window(0, window)
        for name in (manifest.shards[shard].sha256, manifest.shards[shard].index_sha256)
    }
    assert set(settle(cache)) == {"lock", *expected}


def test_a_failed_prefetch_is_made_good(manifest: Manifest, server: FileServer, cache: Cache) -> None:
    far = stream(load_manifest(f"{server.url}/corpus", cache=cache))
    shard = manifest.shards[int(far._order.shards_of_window(0, 1)[0])]
    server.faults[f"corpus/{shard.name}"].extend(["404"])
    far.rows([0])
    settle(cache)  # or, on a busy machine, reading might overtake the prefetch and meet the fault itself
    assert not server.faults[f"corpus/{shard.name}"]
    rows = range(far.rows_per_epoch)
    np.testing.assert_array_equal(far.rows(rows).tokens_BL, stream(manifest).rows(rows).tokens_BL)


@pytest.mark.parametrize("fault", ["cut:300", "short:300", "other"])
def test_a_damaged_manifest_is_refused(manifest: Manifest, server: FileServer, cache: Cache, fault: str) -> None:
    server.faults["corpus/manifest.json"].extend([fault] * 100)
    with pytest.raises(ValueError, match=rf"{server.url}/corpus/manifest.json: "):
        load_manifest(f"{server.url}/corpus", cache=cache)


def test_a_missing_manifest_is_named(server: FileServer, cache: Cache) -> None:
    with pytest.raises(RemoteError, match=rf"{server.url}/nowhere/manifest.json: cannot be fetched: .*404"):
        load_manifest(f"{server.url}/nowhere", cache=cache)


def test_a_manifest_cannot_set_where_its_files_lie(manifest: Manifest, server: FileServer, cache: Cache) -> None:
    far = load_manifest(f"{server.url}/corpus", cache=cache)
    assert far.remote is not None and far.location == f"{server.url}/corpus"
    assert manifest.remote is None and manifest.location == str(manifest.directory)
    with pytest.raises(ValueError, match="protocol 'file'"):
        load_manifest(f"file://{manifest.directory}", cache=cache)
    content = json.loads((manifest.directory / "manifest.json").read_bytes())
    for extra in ({"remote": {"url": "http://other", "cache": {}}}, {"directory": "/etc"}):
        changed = {**content, **extra}
        changed["sha256"] = content_hash(changed)
        (manifest.directory / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="not a manifest of"):
            load_manifest(f"{server.url}/corpus", cache=cache)


def test_a_shard_of_another_size_than_its_manifest_says_is_refused(
    manifest: Manifest, server: FileServer, cache: Cache
) -> None:
    far = load_manifest(f"{server.url}/corpus", cache=cache)
    first = replace(far.shards[0], bytes=far.shards[0].bytes + 512)
    with pytest.raises(ShardError, match="bytes instead of"):
        ShardReader(replace(far, shards=(first, *far.shards[1:])), 0)


def test_the_config_chooses_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "megatron-md"
    assert Cache.of(DataConfig()) == Cache() == Cache(tmp_path / "megatron-md", DataConfig.cache_bytes)
    assert Cache.of(DataConfig(cache_dir="/scratch/x", cache_bytes=5)) == Cache(Path("/scratch/x"), 5)


def test_a_config_with_urls_is_checked_through_its_cache(manifest: Manifest, tmp_path: Path) -> None:
    for path in manifest.directory.iterdir():
        fsspec.filesystem("memory").pipe(f"/checked/{path.name}", path.read_bytes())
    folder = tmp_path / "checked"
    sound = {"train": "memory://checked", "valid": "memory://checked", "cache_dir": str(folder), "seq_length": L}
    config = config_from_mapping({"data": sound})
    assert missing_files(config) == [] and list(corpus_problems(config)) == []
    assert resolve_config(config).model.vocab == manifest.vocab_size
    (problem,) = corpus_problems(config_from_mapping({"data": {**sound, "valid": "memory://nowhere"}}))
    assert problem.startswith("data.valid: memory://nowhere/manifest.json: cannot be fetched")

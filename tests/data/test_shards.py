"""Reading shards: contradictions and damage are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_md.data.shards import ShardError, ShardReader, content_hash, load_manifest
from megatron_md.data.survey import verify_corpus
from tests.data.small_corpus import WriteCorpus, flip_byte, random_documents


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Change keys of a manifest and give it a fitting hash again."""
    content = {**json.loads((folder / "manifest.json").read_text()), **changes}
    content["sha256"] = content_hash(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def test_manifest_is_found_by_folder_and_file(write_tokens: WriteCorpus, tmp_path: Path) -> None:
    manifest = write_tokens([[5, 6], [7]])
    assert load_manifest(tmp_path / "corpus") == manifest == load_manifest(tmp_path / "corpus" / "manifest.json")


def test_missing_empty_and_malformed_manifests(write_tokens: WriteCorpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such manifest"):
        load_manifest(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty/manifest\.json: no such manifest"):
        load_manifest(tmp_path / "empty")
    write_tokens([[5]])
    file = tmp_path / "corpus" / "manifest.json"
    sound = file.read_text()
    file.write_text(sound[:-20])
    with pytest.raises(ValueError, match="malformed JSON"):
        load_manifest(file)
    file.write_text(sound.replace('"tokens": 1', '"tokens": 2', 1))
    with pytest.raises(ValueError, match="does not match its own hash"):
        load_manifest(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="not a manifest of megatron-md-shards"):
        load_manifest(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version: Input should be 1"),
        ({"eos_id": 1000}, "eos_id lies outside the vocabulary of 1000"),
        ({"tokens": 17}, "tokens is not the sum over the shards"),
        ({"surprise": 1}, "surprise: Unexpected keyword argument"),
        ({"vocab_size": "1000"}, "vocab_size: Input should be a valid integer"),
    ],
)
def test_contradictions_are_named(write_tokens: WriteCorpus, tmp_path: Path, changes: Any, message: str) -> None:
    write_tokens([[5, 6]])
    edit_manifest(tmp_path / "corpus", **changes)
    with pytest.raises(ValueError, match=message):
        load_manifest(tmp_path / "corpus")


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "a/../../x.tar", ""])
def test_shard_names_stay_beneath_the_manifest(write_tokens: WriteCorpus, tmp_path: Path, name: str) -> None:
    manifest = write_tokens([[5, 6]])
    shard = {**vars(manifest.shards[0]), "name": name}
    edit_manifest(tmp_path / "corpus", shards=[shard])
    with pytest.raises(ValueError, match="must be relative and beneath the manifest"):
        load_manifest(tmp_path / "corpus")


def test_missing_and_cut_shards(write_tokens: WriteCorpus, tmp_path: Path) -> None:
    write_tokens(random_documents(20), shard_tokens=200)
    path = tmp_path / "corpus" / "shard-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-512])
    with pytest.raises(ShardError, match=rf"shard-000001\.tar: {len(data) - 512} bytes instead of {len(data)}"):
        load_manifest(tmp_path / "corpus")
    manifest = load_manifest(tmp_path / "corpus", check_files=False)
    with pytest.raises(ShardError, match=r"shard-000001\.tar"):
        ShardReader(manifest, 1)
    assert len(verify_corpus(manifest)) == 1
    path.unlink()
    with pytest.raises(ShardError, match=r"shard-000001\.tar: missing shard"):
        load_manifest(tmp_path / "corpus")


def test_damaged_index_is_named(write_tokens: WriteCorpus, tmp_path: Path) -> None:
    manifest = write_tokens([[5, 6, 7], [8, 9]])
    flip_byte(tmp_path / "corpus" / "shard-000000.index.npy", 140)
    with pytest.raises(ShardError, match=r"shard-000000\.index\.npy: does not match its hash"):
        ShardReader(manifest, 0)

"""The manifest: any damage to a checkpoint is refused by the name of the file, on every rank, before it is opened."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_md import parallel
from megatron_md.checkpoint import integrity
from megatron_md.checkpoint.integrity import CheckpointError, digest_files, read_manifest, seal, verify
from tests.checkpoint.saved import save_checkpoint, write_index
from tests.ranks import run_ranks
from tests.small_run import CONFIG


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_ranks(save_checkpoint, 1, tmp_path_factory.mktemp("run"))[0]


@pytest.fixture
def copy(sealed: Path, tmp_path: Path) -> Path:
    shutil.copytree(sealed, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A sealed directory of three files, which are treated as a checkpoint."""
    directory = tmp_path / "small"
    directory.mkdir()
    (directory / "a").write_bytes(b"1234")
    (directory / "b").write_bytes(b"")
    write_index(directory, "a")
    seal(directory)
    return directory


def test_whole_checkpoint_passes_and_its_manifest_is_true(sealed: Path) -> None:
    verify(sealed)
    records = read_manifest(sealed)
    assert {".metadata", "common.pt", "metadata.json", "config.yaml", "progress.json"} < records.keys()
    assert records.keys() | {"manifest.json"} == {path.name for path in sealed.iterdir()}
    assert {name: record.bytes for name, record in records.items()} == {
        name: (sealed / name).stat().st_size for name in records
    }


def test_any_flipped_byte_in_any_file_is_refused(copy: Path) -> None:
    generator = random.Random(0)
    for path in sorted(copy.iterdir()):
        content = path.read_bytes()
        positions = {0, len(content) // 2, len(content) - 1, *(generator.randrange(len(content)) for _ in range(5))}
        for position in positions:
            damaged = bytearray(content)
            damaged[position] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError) as refusal:
                verify(copy)
            # Damage inside the manifest shows as damage to it, or to a file that it names otherwise.
            assert path.name in str(refusal.value) or path.name == "manifest.json"
            assert str(copy) in str(refusal.value)
        path.write_bytes(content)
    verify(copy)


def test_every_byte_of_the_manifest_counts(small: Path) -> None:
    path = small / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            verify(small)
    path.write_bytes(content)
    verify(small)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "progress.json", "config.yaml", "__0_0.distcp"])
def test_truncated_or_missing_file_is_named(name: str, copy: Path) -> None:
    size = (copy / name).stat().st_size
    os.truncate(copy / name, size - 1)
    with pytest.raises(CheckpointError, match=f"{name} has {size - 1} bytes instead of {size}"):
        verify(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        verify(copy)


def test_extra_file_link_and_directory_are_named(small: Path) -> None:
    (small / "extra").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"extra is not in manifest\.json"):
        verify(small)
    (small / "extra").unlink()
    for make in (lambda path: path.mkdir(), lambda path: path.symlink_to(small / "a"), os.mkfifo):
        make(small / "extra")
        with pytest.raises(CheckpointError, match="extra: is not a regular file"):
            verify(small)
        with pytest.raises(CheckpointError, match="extra: is not a regular file"):
            seal(small)
        (small / "extra").rmdir() if (small / "extra").is_dir() else (small / "extra").unlink()
    shutil.move(small / "a", small.parent / "a")
    (small / "a").symlink_to(small.parent / "a")
    with pytest.raises(CheckpointError, match="a: is not a regular file"):
        verify(small)


@pytest.mark.parametrize("name", ["../a", "x/y", "", "..", "/etc/passwd", "a\0"])
def test_manifest_that_points_elsewhere_is_refused(name: str, small: Path) -> None:
    records = {**read_manifest(small), name: integrity.FileRecord(0, "0" * 64)}
    (small / "manifest.json").write_text(integrity._manifest_text(records))
    with pytest.raises(CheckpointError, match="names files outside"):
        verify(small)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"format": 2, "files": {}}', '{"format": 1, "files": []}', "[" * 100_000]
)
def test_manifest_of_another_form_is_refused(text: str, small: Path) -> None:
    (small / "manifest.json").write_text(text)
    for trust in (False, True):
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify(small, trust=trust)


def test_without_manifest_only_trust_helps_and_it_excuses_no_damage(small: Path) -> None:
    (small / "a").write_bytes(b"1235")
    with pytest.raises(CheckpointError, match="a is damaged"):
        verify(small, trust=True)
    (small / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json.*--trust"):
        verify(small)
    verify(small, trust=True)
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        verify(small / "nowhere", trust=True)


def test_data_files_and_what_tensors_are_read_from_must_agree(small: Path) -> None:
    def resealed(*used: str) -> None:
        write_index(small, *used)
        (small / "manifest.json").unlink()
        seal(small)

    resealed()
    with pytest.raises(CheckpointError, match=r"it has no data: \.metadata names no file"):
        verify(small)
    resealed("a", "c")
    with pytest.raises(CheckpointError, match=r"\.metadata takes data from 'c', which is not in manifest\.json"):
        verify(small)
    (small / "__1_0.distcp").write_bytes(b"1")
    resealed("a")
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp is not used by \.metadata"):
        verify(small)
    resealed("a", "__1_0.distcp")
    verify(small)
    (small / ".metadata").unlink()
    (small / "manifest.json").unlink()
    seal(small)
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be read"):
        verify(small)


def test_records_of_files_that_have_changed_or_gone_are_not_sealed(small: Path) -> None:
    own = digest_files(small, ["a"])
    (small / "a").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="a: is not there any more as it was hashed"):
        seal(small, own)
    (small / "a").unlink()
    with pytest.raises(CheckpointError, match="a: is not there any more as it was hashed"):
        seal(small, own)
    with pytest.raises(CheckpointError, match="a: cannot be read"):
        digest_files(small, ["a"])


def shared_work(directory: Path, damaged: str | None) -> tuple[list[str], str | None]:
    """Which files this rank hashed in sealing and verifying, and what it was told."""
    hashed: list[str] = []
    plain = digest_files

    def counting(where: Path, names: list[str]) -> dict[str, integrity.FileRecord]:
        hashed.extend(names)
        return plain(where, names)

    with parallel.session(CONFIG):
        rank = dist.get_rank()
        own = digest_files(directory, [f"own_{rank}"])
        integrity.digest_files = counting  # type: ignore[assignment]
        seal(directory, own)
        if damaged is not None and rank == 0:
            content = bytearray((directory / damaged).read_bytes())
            content[-1] ^= 1
            (directory / damaged).write_bytes(content)
        dist.barrier()
        try:
            verify(directory)
        except CheckpointError as error:
            return hashed, str(error)
    return hashed, None


@pytest.mark.distributed
@pytest.mark.parametrize("damaged", [None, "own_1", "common"])
def test_ranks_share_the_hashing_and_learn_the_same(damaged: str | None, tmp_path: Path) -> None:
    sizes = {"own_0": 10, "own_1": 20, "common": 5000, "metadata": 3000, "tiny": 1, "config": 2000}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    write_index(tmp_path, "own_0", "own_1")
    sizes[".metadata"] = (tmp_path / ".metadata").stat().st_size
    outcomes = run_ranks(shared_work, 2, tmp_path, damaged)
    hashed = [name for names, _ in outcomes for name in names]
    # Sealing hashed what no rank had, verifying hashed everything; each file once.
    assert sorted(hashed) == sorted([*sizes, "common", "metadata", "tiny", "config", ".metadata"])
    loads = [sum(sizes[name] for name in names) for names, _ in outcomes]
    assert max(loads) < 0.6 * sum(loads)
    messages = {text for _, text in outcomes}
    assert len(messages) == 1
    (message,) = messages
    assert message is None if damaged is None else f"{damaged} is damaged" in str(message)


def failing_seal(directory: Path) -> str:
    """Rank 1 brings the record of a file that is not there."""
    with parallel.session(CONFIG):
        own = {"ghost": integrity.FileRecord(1, "0" * 64)} if dist.get_rank() == 1 else {}
        try:
            seal(directory, own)
        except CheckpointError as error:
            return str(error)
    return "sealed"


@pytest.mark.distributed
def test_one_rank_s_failure_to_seal_is_everybody_s(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    messages = set(run_ranks(failing_seal, 2, tmp_path))
    assert len(messages) == 1
    assert "ghost: is not there any more" in messages.pop()
    assert not (tmp_path / "manifest.json").exists()


def test_manifest_is_json_of_sizes_and_hashes(small: Path) -> None:
    content = json.loads((small / "manifest.json").read_text())
    # sha256 of nothing and of "1234", as sha256sum prints them.
    assert content["files"]["b"]["sha256"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert content["files"]["a"]["sha256"] == "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4"
    assert content["format"] == 1

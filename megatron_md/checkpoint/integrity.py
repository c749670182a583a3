"""What proves that a checkpoint is whole: `manifest.json`, written last, with the size and sha256 of every other file.

Hashes catch damage, not malice: whoever can write the files can write the manifest. `safe_pickle` deals with malice.
torch is touched only where a job is running already, so that a directory can be verified without importing it.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from megatron_md.checkpoint.safe_pickle import CheckpointError, check, is_plain_name
from megatron_md.files import sync, write_synced
from megatron_md.together import on_main, place, together

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
_THREADS = 4  # hashing leaves Python's lock; a rank's files are few and large

T = TypeVar("T")


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of one file.

    Attributes:
        bytes: its size.
        sha256: hash of its content, in hexadecimal.
    """

    bytes: int
    sha256: str


def digest_files(directory: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Hash files of a directory, several at once; may run in a background thread.

    Raises:
        CheckpointError: one of them cannot be read.
    """

    def digest(name: str) -> FileRecord:
        path = directory / name
        try:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                return FileRecord(file.tell(), sha256)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error

    listed = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(listed, pool.map(digest, listed), strict=True))


def seal(directory: Path, own: Mapping[str, FileRecord] | None = None) -> None:
    """Write the manifest of a complete directory; every rank calls this, after all files are on disk.

    Files that no rank has hashed yet are spread over the ranks by size.

    Args:
        directory: the checkpoint, on storage that all ranks see.
        own: what this rank has hashed already, as from `digest_files`.

    Raises:
        CheckpointError: a file cannot be read, or is not what was hashed; the same on every rank.
    """
    records: dict[str, FileRecord] = {}
    for part in together(lambda: dict(own or {})):
        records.update(part)
    sizes = on_main(lambda: _sizes(directory))
    missing = sorted(name for name in records if sizes.get(name) != records[name].bytes)
    if missing:
        raise CheckpointError(f"{directory / missing[0]}: is not there any more as it was hashed")
    for part in _digest_shares(directory, {name: size for name, size in sizes.items() if name not in records}):
        records.update(part)

    def write() -> None:
        write_synced(directory / MANIFEST_NAME, _manifest_text(records))
        sync(directory)

    on_main(write)


def verify(directory: Path, *, trust: bool = False) -> None:
    """Compare a checkpoint with its manifest, and what its tensors are read from with its files, before it is opened.

    Collective where torch.distributed is initialised: every rank calls it and hashes its share.

    Args:
        directory: the checkpoint.
        trust: take a directory without a manifest as it is. Damage that a manifest shows is refused all the same.

    Raises:
        CheckpointError: no manifest, files that are missing, damaged or not listed, or a `.metadata` that takes data
            from other files than these; the same on every rank.
    """

    def expect() -> dict[str, FileRecord] | None:
        if trust and directory.is_dir() and not (directory / MANIFEST_NAME).exists():
            _sizes(directory)
            return None
        return verify_listing(directory)

    records = on_main(expect)
    if records is None:
        return
    found: dict[str, FileRecord] = {}
    for part in _digest_shares(directory, {name: record.bytes for name, record in records.items()}):
        found.update(part)
    _refuse(
        directory, [f"{name} is damaged (its sha256 has changed)" for name in records if found[name] != records[name]]
    )
    on_main(lambda: _refuse(directory, _foreign_data(directory, records)))


def verify_listing(directory: Path) -> dict[str, FileRecord]:
    """Compare names and sizes with the manifest, on this process alone; reads no content.

    Returns:
        The manifest's records.

    Raises:
        CheckpointError: no manifest, or files that are missing, of another size or not listed.
    """
    records = read_manifest(directory)
    _refuse(directory, _differences(records, _sizes(directory)))
    return records


def _foreign_data(directory: Path, records: Mapping[str, FileRecord]) -> list[str]:
    """Where the data files are not the ones that `.metadata` takes its tensors from."""
    used = check(directory / ".metadata")
    lines = [f".metadata takes data from {name!r}, which is not in {MANIFEST_NAME}" for name in used - records.keys()]
    lines += [f"{name} is not used by .metadata" for name in records if name.endswith(".distcp") and name not in used]
    return sorted(lines) if used else [*sorted(lines), "it has no data: .metadata names no file"]


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """The records of `manifest.json`.

    Raises:
        CheckpointError: there is none, or it is not as `seal` writes it, to the byte.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory")
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(
            f"{directory}: has no {MANIFEST_NAME}: incomplete, or not of this program, and cannot be verified; "
            "--trust opens it unverified"
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if content["format"] != MANIFEST_FORMAT:
            raise CheckpointError(f"{path}: format {str(content['format'])[:40]!r} is not {MANIFEST_FORMAT}")
        records = {name: FileRecord(**record) for name, record in content["files"].items()}
        is_intact = all(map(is_plain_name, records)) and text == _manifest_text(records)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is damaged ({type(error).__name__})") from error
    if not is_intact:
        raise CheckpointError(f"{path}: is damaged, or names files outside the checkpoint")
    return records


def weights_digest(directory: Path) -> str:
    """One sha256 for the tensors of a checkpoint, from its manifest: the same wherever it lies, and converted anew.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    records = read_manifest(directory)
    lines = [f"{name} {record.sha256}\n" for name, record in sorted(records.items()) if name.endswith(".distcp")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _manifest_text(records: Mapping[str, FileRecord]) -> str:
    files = {name: asdict(records[name]) for name in sorted(records)}
    return json.dumps({"format": MANIFEST_FORMAT, "files": files}, indent=1) + "\n"


def _sizes(directory: Path) -> dict[str, int]:
    """Size of every file but the manifest.

    Raises:
        CheckpointError: something in the directory is no regular file.
    """
    sizes = {}
    try:
        for path in sorted(directory.iterdir()):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: is not a regular file, and a checkpoint holds nothing else")
            sizes[path.name] = status.st_size
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error.strerror or error})") from error
    sizes.pop(MANIFEST_NAME, None)
    return sizes


def _differences(records: Mapping[str, FileRecord], sizes: Mapping[str, int]) -> list[str]:
    lines = [f"{name} is missing" for name in records if name not in sizes]
    lines += [f"{name} is not in {MANIFEST_NAME}" for name in sizes if name not in records]
    for name, record in records.items():
        if sizes.get(name, record.bytes) != record.bytes:
            lines.append(f"{name} has {sizes[name]} bytes instead of {record.bytes}")
    return lines


def _refuse(directory: Path, damages: list[str]) -> None:
    if damages:
        more = f"; and {len(damages) - 3} more" if len(damages) > 3 else ""
        raise CheckpointError(f"{directory}: {'; '.join(damages[:3])}{more}: use another checkpoint")


def _digest_shares(directory: Path, sizes: Mapping[str, int]) -> list[dict[str, FileRecord]]:
    """Hash files, each on one rank, about the same number of bytes on every rank; the results of all ranks."""
    rank, world_size = place()
    loads = [(0, number) for number in range(world_size)]
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, number = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[name], number))
        if number == rank:
            mine.append(name)
    return together(lambda: digest_files(directory, mine))

"""Indexing of tars that were made elsewhere in the format of our members: sidecars and a manifest beside them.

A tar holds pairs of members, `KEY.tokens.bin` (little-endian uint16 or uint32) and `KEY.lengths.bin` (uint32 tokens
per document), in either order; tars of dialogues have `KEY.answers.bin` with every pair (`megatron_md.data.answers`).
Everything else is refused. A `SHA256SUMS` file in the folder is checked where there
is one: it is the only way to notice flipped bits inside of data that nobody has indexed yet.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_md.data.answers import RUN_DTYPE, runs_in
from megatron_md.data.resume import BuildProgress
from megatron_md.data.shard_index import CHAT_INDEX_DTYPE, INDEX_DTYPE
from megatron_md.data.shards import MANIFEST_NAME, Manifest, ShardError, load_manifest
from megatron_md.data.tar import Member, TarError, read_members
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.data.writer import Vocabulary, describe_shard, write_manifest
from megatron_md.errors import UserError

# Bytes. 16 MiB of lengths are 4 million documents, whose entries in the index take four times that.
LARGEST_MEMBER = {"tokens.bin": 1 << 30, "lengths.bin": 1 << 24, "answers.bin": 1 << 26}
SUMS_NAME = "SHA256SUMS"
SUMS_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def index_corpus(
    folder: str | Path, tokenizer: str | Path, *, on_progress: Callable[[BuildProgress], None] | None = None
) -> Manifest:
    """Index every `.tar` of a folder, and write the manifest of all.

    Args:
        folder: where the tars lie; sidecars and manifest are written there.
        tokenizer: what the documents were tokenised with.
        on_progress: called after every shard.

    Raises:
        UserError: the folder holds no tar, or a manifest already.
        ShardError: a tar is damaged or not in our format; names the shard, the member and the document.
    """
    folder = Path(folder)
    loaded = Tokenizer(tokenizer)
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise UserError(f"{folder}: no .tar file in this folder")
    if (folder / MANIFEST_NAME).exists():
        raise UserError(f"{folder / MANIFEST_NAME}: exists; check it with `data verify`, or delete it to index again")
    sums = _read_sums(folder)
    progress, scans, itemsize = BuildProgress(), [], 0
    is_chat = None
    for path in tars:
        scan = _Scan(itemsize, is_chat)
        try:
            _scan(path, scan, loaded, sums.get(path.name))
        except TarError as error:
            raise ShardError(f"{error}: the documents from {scan.documents} on are not there") from error
        itemsize, is_chat = scan.itemsize, scan.is_chat
        scans.append(scan)
        progress.documents += scan.documents
        progress.tokens += scan.tokens
        progress.text_bytes += scan.text_bytes
        progress.answer_tokens += scan.answer_tokens
        if on_progress is not None:
            on_progress(progress)
    shards = [
        describe_shard(path, np.concatenate(scan.parts), scan.sha256) for path, scan in zip(tars, scans, strict=True)
    ]
    vocabulary = replace(Vocabulary.of(loaded), token_bytes=itemsize or None)
    write_manifest(folder, vocabulary, progress, shards, {"inputs": [folder.resolve().name], "indexed": True})
    return load_manifest(folder)


@dataclass
class _Scan:
    """What a tar holds; bytes per token and whether there are answers are 0 and None until they are known."""

    itemsize: int
    is_chat: bool | None
    sha256: str = ""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    answer_tokens: int = 0
    parts: list[npt.NDArray[np.void]] = field(default_factory=list)


class _Hashing:
    """A file that is hashed while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self.sha256.update(data)
        return data


def _scan(path: Path, scan: _Scan, tokenizer: Tokenizer, expected_sha256: str | None) -> None:
    """Read a tar strictly into `scan`, which knows about the tars before it."""
    keys: set[str] = set()
    sample: dict[str, tuple[Member, bytes]] = {}
    last = ""
    with path.open("rb") as file:
        hashing = _Hashing(file)
        try:
            for member, data in read_members(hashing, path):
                if _is_complete(sample) and member.name != f"{last}.answers.bin":
                    _add_sample(path, scan, tokenizer, sample)
                    sample = {}
                key, kind = _key_and_kind(path, member, scan.documents)
                if sample and (key != last or kind in sample):
                    _add_sample(path, scan, tokenizer, sample)
                    sample = {}
                if not sample and key in keys:
                    raise ShardError(f"{path}: sample key {key!r} occurs twice, at document {scan.documents}")
                keys.add(key)
                sample[kind], last = (member, data.read()), key
        except TarError:
            # What stands before the damage is there, and counts.
            if _is_complete(sample):
                _add_sample(path, scan, tokenizer, sample)
            raise
        if sample:
            _add_sample(path, scan, tokenizer, sample)
        scan.sha256 = hashing.sha256.hexdigest()
    if not scan.documents:
        raise ShardError(f"{path}: holds no document; remove the file")
    if expected_sha256 not in (None, scan.sha256):
        raise ShardError(f"{path}: its sha256 is not that of {SUMS_NAME}; restore the shard")


def _key_and_kind(path: Path, member: Member, document: int) -> tuple[str, str]:
    key, _, suffix = member.name.partition(".")
    problem = member.problem
    if problem is None and suffix not in LARGEST_MEMBER:
        problem = "neither .tokens.bin nor .lengths.bin"
    if problem is None and member.size > LARGEST_MEMBER[suffix]:
        problem = f"{member.size} bytes in one member, {LARGEST_MEMBER[suffix]} at most"
    if problem is not None:
        raise ShardError(f"{path}: member {member.name!r} at document {document}: {problem}; make the tar without it")
    return key, suffix.removesuffix(".bin")


def _is_complete(sample: dict[str, tuple[Member, bytes]]) -> bool:
    return {"tokens", "lengths"} <= sample.keys()


def _add_sample(path: Path, scan: _Scan, tokenizer: Tokenizer, sample: dict[str, tuple[Member, bytes]]) -> None:
    """Check the members of one key and index their documents."""
    if not _is_complete(sample):
        name = next(iter(sample.values()))[0].name
        raise ShardError(
            f"{path}: member {name!r} has no partner (.tokens.bin and .lengths.bin), so the documents from "
            f"{scan.documents} on are lost; restore the shard"
        )
    (member, data), lengths_data = sample["tokens"], sample["lengths"][1]
    where = f"{path}: member {member.name!r} at document {scan.documents}"
    if len(lengths_data) % 4 or not lengths_data:
        raise ShardError(f"{where}: its lengths member of {len(lengths_data)} bytes is no list of uint32")
    if scan.is_chat not in (None, "answers" in sample):
        raise ShardError(f"{where}: it and those before do not both have .answers.bin; index them apart")
    scan.is_chat = "answers" in sample
    lengths = np.frombuffer(lengths_data, "<u4").astype(np.int64)
    total = int(lengths.sum())
    itemsize = len(data) // total if total and not len(data) % total else 0
    if itemsize not in (2, 4) and (total or data):
        raise ShardError(f"{where}: {len(data)} bytes do not fit the {total} tokens of its lengths; restore the shard")
    if itemsize and scan.itemsize not in (0, itemsize):
        raise ShardError(f"{where}: {itemsize} bytes per token, but {scan.itemsize} before it; index them apart")
    scan.itemsize = itemsize or scan.itemsize
    ends = np.cumsum(lengths)
    values = np.frombuffer(data, f"<u{itemsize or 2}")
    block = np.zeros(len(lengths), CHAT_INDEX_DTYPE if scan.is_chat else INDEX_DTYPE)
    block["tokens"] = lengths
    block["offset"] = member.offset + (ends - lengths) * itemsize
    for number, (start, stop) in enumerate(zip((ends - lengths).tolist(), ends.tolist(), strict=True)):
        document = values[start:stop]
        if document.size and int(document.max()) >= tokenizer.vocab_size:
            raise ShardError(
                f"{path}: document {scan.documents + number} holds token {int(document.max())}, outside the vocabulary "
                f"of {tokenizer.vocab_size}; restore the shard or give its tokenizer"
            )
        block["crc32"][number] = zlib.crc32(document.data)
        scan.text_bytes += len(tokenizer.decode(document).encode())
    if scan.is_chat:
        scan.answer_tokens += _add_answers(where, block, *sample["answers"])
    scan.parts.append(block)
    scan.documents += len(lengths)
    scan.tokens += total


def _add_answers(where: str, block: npt.NDArray[np.void], member: Member, data: bytes) -> int:
    """Check the answers of a block's documents, complete its index, and count their tokens."""
    table = np.frombuffer(data[: len(data) // RUN_DTYPE.itemsize * RUN_DTYPE.itemsize], RUN_DTYPE)
    edges = np.searchsorted(table["document"], np.arange(len(block) + 1)) if table.nbytes == len(data) else None
    answer_tokens = 0
    for number, entry in enumerate(block):
        first, stop = (0, 0) if edges is None else edges[number : number + 2]
        runs = runs_in(table[first:stop], int(entry["tokens"]))
        if runs is None:
            raise ShardError(f"{where}: {member.name!r} has no sound answers of its document {number}; restore it")
        entry["answers_offset"] = member.offset + first * RUN_DTYPE.itemsize
        entry["answer_runs"], entry["answers_crc32"] = stop - first, zlib.crc32(table[first:stop].tobytes())
        answer_tokens += int(np.diff(runs).sum())
    if edges is None or edges[-1] != len(table):
        raise ShardError(f"{where}: {member.name!r} has answers of documents that are not there; restore it")
    return answer_tokens


def _read_sums(folder: Path) -> dict[str, str]:
    """Hashes by file name, as the `sha256sum` tool lists them."""
    file = folder / SUMS_NAME
    if not file.is_file():
        return {}
    sums: dict[str, str] = {}
    for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), start=1):
        match = SUMS_LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{file}: line {number} is not '<sha256>  <file>'")
        sums[match[2]] = match[1]
    return sums

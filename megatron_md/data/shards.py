"""Shards: WebDataset tar files of tokenised documents, each with a strict index, under one manifest.

A corpus is a folder:

    manifest.json             tokenizer, vocabulary, totals, every shard with its size and hash, and its own hash
    shard-000000.tar          members 000000-000000.tokens.bin (about 1 MiB of documents, little-endian uint16 or
                              uint32) and 000000-000000.lengths.bin (uint32 tokens per document), and so on
    shard-000000.index.npy    per document: byte offset in the tar, tokens, crc32 of its bytes
    rejected.jsonl            documents that were left out, with reasons

A corpus of dialogues (`kind` "chat") also has members 000000-000000.answers.bin (see `megatron_md.data.answers`), and
in its index for each document the offset in the tar, the number and the crc32 of its runs.

Documents are stored without `<eos>`. Stock `webdataset` reads the tars; our own reader goes by the index, so that any
document is found at once and damage is noticed. It does not map them into memory: where a mapped file is cut, the
system kills the process (SIGBUS) before it can say a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from megatron_md.batch import Int64Array
from megatron_md.data import remote
from megatron_md.data.answers import RUN_DTYPE, runs_in
from megatron_md.data.cache import Cache
from megatron_md.data.remote import RemoteFile
from megatron_md.data.shard_index import (
    CHAT_INDEX_DTYPE,
    INDEX_DTYPE,
    MAX_INDEX_HEADER,
    STRICT,
    Count,
    Index,
    Sha256,
    Shard,
    parse_index,
    spans,
)
from megatron_md.errors import UserError
from megatron_md.json_file import parse_json, read_regular
from megatron_md.messages import redacted

MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
FORMAT = "megatron-md-shards"
MAX_MANIFEST_BYTES = 1 << 28
LARGEST_VOCABULARY = 1 << 24
BLOCK_BYTES = 1 << 20
PLACES = {"directory", "remote"}  # fields of a manifest that are not for the file to set


class ShardError(UserError):
    """A shard or its index is damaged; the message names the file and, where known, the document."""


class DamagedDocumentError(ShardError):
    """A document's bytes do not match their crc32; the rest of its shard may be sound."""


@dataclass(frozen=True)
class Remote:
    """Where a remote corpus lies (the URL of its folder) and where its files are kept while they are used."""

    url: str
    cache: Cache


@dataclass(frozen=True)
class Manifest:
    """A tokenised corpus: the content of its `manifest.json`.

    Attributes:
        text_bytes: UTF-8 bytes of the documents that were written, for bits per byte.
        source: where the corpus came from and how many documents were rejected, by reason.
        sha256: hash of everything else in the file; with the seed it decides the order of a run.
        directory: folder of the file (of a remote corpus: its cache); not part of it.
        kind: whether it is made of dialogues, of which answers are marked.
        answer_tokens: tokens that belong to answers, of a corpus of dialogues.
        remote: set for a corpus at a URL; not part of the file.
    """

    __pydantic_config__ = STRICT

    format: Literal["megatron-md-shards"]
    version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(gt=0, le=LARGEST_VOCABULARY)]
    eos_id: Count
    mask_id: Count
    pad_id: Count
    tokenizer_sha256: Sha256
    documents: Annotated[Count, Field(gt=0)]
    tokens: Count
    text_bytes: Count
    source: dict[str, Any]
    shards: tuple[Shard, ...]
    sha256: Sha256
    directory: Path
    kind: Literal["text", "chat"] = "text"
    answer_tokens: Count = 0
    remote: Remote | None = None

    @property
    def location(self) -> str:
        """Folder or URL of the corpus, for messages."""
        return str(self.directory) if self.remote is None else str(redacted(self.remote.url))

    def remote_files(self, number: int) -> tuple[RemoteFile, RemoteFile]:
        """Shard `number` of a remote corpus, and its index."""
        assert self.remote is not None
        shard, url = self.shards[number], self.remote.url
        index_bytes = shard.documents * self.index_dtype.itemsize + MAX_INDEX_HEADER
        return (
            RemoteFile(remote.beneath(url, shard.name), shard.bytes, shard.sha256),
            RemoteFile(remote.beneath(url, shard.index), index_bytes, shard.index_sha256),
        )

    def open_shard(self, number: int) -> tuple[BufferedReader, BufferedReader]:
        """Open shard `number` and its index, through the cache where the corpus is remote.

        Raises:
            ShardError: one of them is missing, or the shard has another size.
            RemoteError: one of them cannot be fetched.
        """
        shard = self.shards[number]
        if self.remote is not None:
            file, index = self.remote_files(number)
            return self.remote.cache.open(file), self.remote.cache.open(index)
        _check_size(self, shard)
        path = self.directory / shard.index
        if not os.path.isfile(path):
            raise ShardError(f"{path}: missing index; restore it or build the shards again")
        try:
            return (self.directory / shard.name).open("rb"), path.open("rb")
        except OSError as error:
            raise ShardError(
                f"{error.filename}: cannot be read ({error.strerror}); restore it or build the shards again"
            ) from error

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """Little-endian type of the stored tokens."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def index_dtype(self) -> np.dtype[Any]:
        """What an index holds of each document."""
        return CHAT_INDEX_DTYPE if self.kind == "chat" else INDEX_DTYPE


def content_hash(content: dict[str, Any]) -> str:
    """Hash of a manifest's content, its own `sha256` left out: independent of spacing and key order."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_manifest(path: str | Path, *, check_files: bool = True, cache: Cache | None = None) -> Manifest:
    """Read a manifest and check it.

    Args:
        path: the `manifest.json` or its folder, on a disk or at a URL (see `megatron_md.data.remote`).
        check_files: also check that every shard is there with its size (not its content: see `data.survey`);
            the shards of a remote corpus are checked when they are fetched.
        cache: where the shards of a remote corpus are kept while they are used.

    Raises:
        UserError: it is missing, malformed or contradicts itself, or (a `ShardError`) a shard is missing or cut,
            or (a `RemoteError`) it cannot be fetched.
    """
    file: str | Path
    if remote.is_url(path):
        url = str(path).rstrip("/")
        file = url if url.endswith(".json") else f"{url}/{MANIFEST_NAME}"
        data = remote.read(file, MAX_MANIFEST_BYTES)
        origin = Remote(file.rpartition("/")[0], cache or Cache())
        return _parse_manifest(file, data, origin.cache.directory, origin)
    path = Path(path)
    file = path / MANIFEST_NAME if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{file}: no such manifest; build shards with `megatron-md data build`")
    data = read_regular(file, "build the shards again", most_bytes=MAX_MANIFEST_BYTES)
    manifest = _parse_manifest(file, data, file.parent, None)
    if check_files:
        for shard in manifest.shards:
            _check_size(manifest, shard)
    return manifest


def _parse_manifest(file: str | Path, data: bytes, directory: Path, origin: Remote | None) -> Manifest:
    content = parse_json(data, file, "build the shards again")
    if not isinstance(content, dict) or content.get("format") != FORMAT or PLACES & content.keys():
        raise UserError(f"{file}: not a manifest of {FORMAT}")
    sha256 = content_hash(content)
    try:
        # The bytes themselves, as writing a large manifest anew would take as long as reading it.
        place = json.dumps({"directory": str(directory)}).encode()
        manifest = TypeAdapter(Manifest).validate_json(data.rstrip()[:-1] + b"," + place[1:])
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{file}: {key}: {problem['msg']}; build the shards again") from error
    _check_consistent(file, manifest, sha256)
    return replace(manifest, remote=origin)


def _check_consistent(file: str | Path, manifest: Manifest, sha256: str) -> None:
    if sha256 != manifest.sha256:
        raise UserError(
            f"{file}: its content does not match its own hash: it was edited or cut; build the shards again"
        )
    names = [name for shard in manifest.shards for name in (shard.name, shard.index)]
    for name in names:
        # By hand: pathlib takes seconds for the shards of a trillion tokens.
        is_bad = not name.strip("./") or name.startswith("/") or "\\" in name or "\0" in name
        if is_bad or ".." in name.split("/"):
            raise UserError(f"{file}: shard name {name!r} must be relative and beneath the manifest")
    if len(set(names)) < len(names):
        raise UserError(f"{file}: a shard is named twice")
    for key in ("documents", "tokens"):
        if sum(getattr(shard, key) for shard in manifest.shards) != getattr(manifest, key):
            raise UserError(f"{file}: {key} is not the sum over the shards")
    if manifest.answer_tokens > manifest.tokens or (manifest.answer_tokens > 0) != (manifest.kind == "chat"):
        raise UserError(f"{file}: answer_tokens is not a number of answers of {manifest.kind}")
    for key in ("eos_id", "mask_id", "pad_id"):
        if getattr(manifest, key) >= manifest.vocab_size:
            raise UserError(f"{file}: {key} lies outside the vocabulary of {manifest.vocab_size}")


def _check_size(manifest: Manifest, shard: Shard) -> None:
    path = manifest.directory / shard.name
    if not os.path.isfile(path):  # which takes any name
        raise ShardError(
            f"{path}: missing shard of {shard.documents} documents; restore the file or build the shards again"
        )
    size = path.stat().st_size
    if size != shard.bytes:
        raise ShardError(
            f"{path}: {size} bytes instead of {shard.bytes}{_cut_off(manifest, shard, size)}; "
            "restore the shard or build again"
        )


def read_index(manifest: Manifest, shard: Shard) -> Index | None:
    """Index of a shard that need not be sound itself; None where the index is not."""
    path = manifest.directory / shard.index
    data = path.read_bytes() if os.path.isfile(path) else b""
    return parse_index(data, shard, manifest.index_dtype, manifest.token_dtype.itemsize)


def _cut_off(manifest: Manifest, shard: Shard, size: int) -> str:
    """Which documents a shard of `size` bytes lacks, as far as its index tells."""
    index = read_index(manifest, shard)
    if index is None or size > shard.bytes:
        return ""
    _, ends = spans(index["offset"], index["tokens"], manifest.token_dtype.itemsize)
    lost = np.flatnonzero(ends > size)
    return f"; document {lost[0]} and {len(lost) - 1} after it are lost" if len(lost) else "; no document is lost"


class ShardReader:
    """Random access to the documents of one shard, by its index.

    Attributes:
        index: structured array [documents] with `offset`, `tokens` and `crc32`, of dialogues also
            `answers_offset`, `answer_runs` and `answers_crc32`.
    """

    def __init__(self, manifest: Manifest, number: int) -> None:
        """Open shard `number`.

        Raises:
            ShardError: the shard or its index is missing, has another size, or they do not fit together.
            RemoteError: one of them cannot be fetched.
        """
        self._shard = manifest.shards[number]
        self._dtype, self._size = manifest.token_dtype, manifest.token_dtype.itemsize
        file, index_file = manifest.open_shard(number)
        with file, index_file:
            self.path = Path(file.name)
            index = parse_index(index_file.read(), self._shard, manifest.index_dtype, self._size)
            if index is None:
                raise ShardError(
                    f"{index_file.name}: does not match its hash, or is no index of the {self._shard.documents} "
                    f"documents of {self.path.name}; restore it or build the shards again"
                )
            self.index = index
            # It keeps the file open, and with it the lock that a cached file is held by.
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        size = os.fstat(self._descriptor).st_size
        if size != self._shard.bytes:
            raise ShardError(f"{self.path}: {size} bytes instead of {self._shard.bytes}; build the shards again")
        # Views, as they give plain numbers, several times as fast as the fields of the index.
        self._offsets = self.index["offset"].astype(np.int64).data
        self._lengths = self.index["tokens"].astype(np.int64).data
        self._crc32 = self.index["crc32"].astype(np.int64).data

    def document(self, number: int) -> npt.NDArray[np.unsignedinteger]:
        """Tokens [n] of a document, which cannot be written to.

        Raises:
            DamagedDocumentError: as `read`.
        """
        return np.frombuffer(self.read(number, 0, self._lengths[number], verify=True), self._dtype)

    def read(self, number: int, start: int, stop: int, *, verify: bool) -> bytes:
        """Tokens `start` to `stop` (not included, at most all) of a document, as they are stored.

        Raises:
            DamagedDocumentError: the file has been cut before their end; under `verify` also: the bytes of the whole
                document do not match their crc32.
            OSError: the file cannot be read.
        """
        size = self._size
        offset, length = self._offsets[number], self._lengths[number] * size
        first, last = start * size, stop * size
        last = length if last > length else last
        at, count = (offset, length) if verify else (offset + first, last - first)
        data = self._read(at, count)
        if len(data) != count:
            problem = f"the file ends at byte {os.fstat(self._descriptor).st_size}"
        elif verify and zlib.crc32(data) != self._crc32[number]:
            problem = "its crc32 differs"
        else:
            return data[first:last] if verify else data
        raise DamagedDocumentError(
            f"{self.path}: document {number} (bytes {offset} to {offset + length}) is damaged: {problem}; "
            "restore the shard"
        )

    def answers(self, number: int) -> Int64Array:
        """Begin and end [runs, 2] of the answers of a dialogue, in its tokens, ascending.

        Raises:
            DamagedDocumentError: they do not match their crc32, or cannot be those of this document.
        """
        entry = self.index[number]
        offset, count = int(entry["answers_offset"]), int(entry["answer_runs"]) * RUN_DTYPE.itemsize
        data = self._read(offset, count)
        is_sound = len(data) == count and zlib.crc32(data) == entry["answers_crc32"]
        runs = runs_in(np.frombuffer(data, RUN_DTYPE), int(entry["tokens"])) if is_sound else None
        if runs is None:
            problem = "they are no runs within it" if is_sound else "their crc32 differs, or the file is cut"
            raise DamagedDocumentError(
                f"{self.path}: the answers of document {number} (bytes {offset} to {offset + count}) are damaged: "
                f"{problem}; restore the shard"
            )
        return runs

    def blocks(self, documents: Int64Array | slice = slice(None)) -> Iterator[npt.NDArray[np.unsignedinteger]]:
        """Tokens of documents (all, or at least one, ascending) that lie side by side, in file order.

        Raises:
            ShardError: the file has been cut.
        """
        index = self.index[documents]
        starts, ends = spans(index["offset"], index["tokens"], self._size)
        cuts = np.flatnonzero(starts[1:] != ends[:-1]) + 1
        for start, stop in zip(starts[[0, *cuts]].tolist(), ends[[*(cuts - 1), -1]].tolist(), strict=True):
            for offset in range(start, stop, BLOCK_BYTES):
                count = min(BLOCK_BYTES, stop - offset)
                data = self._read(offset, count)
                if len(data) != count:
                    raise ShardError(f"{self.path}: cut at byte {offset + len(data)}; restore the shard")
                yield np.frombuffer(data, self._dtype)

    def _read(self, offset: int, count: int) -> bytes:
        """Bytes of the file; fewer than asked for where it ends before."""
        try:
            data = os.pread(self._descriptor, count, offset)
            while 0 < len(data) < count and (more := os.pread(self._descriptor, count - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        return data

"""Shards: WebDataset tar files of tokenised documents, each with a strict index, under one manifest.

A corpus is a folder:

    manifest.json             tokenizer, vocabulary, totals, every shard with its size and hash, and its own hash
    shard-000000.tar          members 000000-000000.tokens.bin (about 1 MiB of documents, little-endian uint16 or
                              uint32) and 000000-000000.lengths.bin (uint32 tokens per document), and so on
    shard-000000.index.npy    per document: byte offset in the tar, tokens, crc32 of its bytes
    rejected.jsonl            documents that were left out, with reasons

Documents are stored without `<eos>`. Stock `webdataset` reads the tars; our own reader maps them into memory and
goes by the index, so that any document is found at once and damage is noticed.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
FORMAT = "megatron-md-shards"
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("tokens", "<u4"), ("crc32", "<u4")])
STRICT = ConfigDict(extra="forbid", strict=True)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardError(ValueError):
    """A shard or its index is damaged; the message names the file and, where known, the document."""


class DamagedDocumentError(ShardError):
    """A document's bytes do not match their crc32; the rest of its shard may be sound."""


@dataclass(frozen=True)
class Shard:
    """One shard of a manifest: file names relative to the manifest, sizes, hashes."""

    __pydantic_config__ = STRICT

    name: str
    documents: PositiveInt
    tokens: NonNegativeInt
    bytes: PositiveInt
    sha256: Sha256
    index: str
    index_sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    """A tokenised corpus: the content of its `manifest.json`.

    Attributes:
        text_bytes: UTF-8 bytes of the documents that were written, for bits per byte.
        source: where the corpus came from and how many documents were rejected, by reason.
        sha256: hash of everything else in the file; with the seed it decides the order of a run.
        directory: folder of the file; not part of it.
    """

    __pydantic_config__ = STRICT

    format: Literal["megatron-md-shards"]
    version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    vocab_size: PositiveInt
    eos_id: NonNegativeInt
    mask_id: NonNegativeInt
    pad_id: NonNegativeInt
    tokenizer_sha256: Sha256
    documents: PositiveInt
    tokens: NonNegativeInt
    text_bytes: NonNegativeInt
    source: dict[str, Any]
    shards: tuple[Shard, ...]
    sha256: Sha256
    directory: Path

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """Little-endian type of the stored tokens."""
        return np.dtype(self.dtype).newbyteorder("<")


def content_hash(content: dict[str, Any]) -> str:
    """Hash of a manifest's content, its own `sha256` left out: independent of spacing and key order."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_manifest(path: str | Path, *, check_files: bool = True) -> Manifest:
    """Read a manifest and check it.

    Args:
        path: the `manifest.json` or its folder.
        check_files: also check that every shard is there with its size (not its content: see `verify`).

    Raises:
        ValueError: it is missing, malformed or contradicts itself, or (a `ShardError`) a shard is missing or cut.
    """
    path = Path(path)
    file = path / MANIFEST_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such manifest; build shards with `megatron-md data build`")
    try:
        data = file.read_bytes()
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{file}: malformed JSON ({error}); build the shards again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{file}: not a manifest of {FORMAT}")
    sha256 = content_hash(content)
    try:
        # The bytes themselves, as writing a large manifest anew would take as long as reading it.
        directory = json.dumps({"directory": str(file.parent)}).encode()
        manifest = TypeAdapter(Manifest).validate_json(data.rstrip()[:-1] + b"," + directory[1:])
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{file}: {key}: {problem['msg']}; build the shards again") from error
    _check_consistent(file, manifest, sha256)
    if check_files:
        for shard in manifest.shards:
            _check_size(manifest, shard)
    return manifest


def _check_consistent(file: Path, manifest: Manifest, sha256: str) -> None:
    if sha256 != manifest.sha256:
        raise ValueError(
            f"{file}: its content does not match its own hash: it was edited or cut; build the shards again"
        )
    names = [name for shard in manifest.shards for name in (shard.name, shard.index)]
    for name in names:
        # By hand: pathlib takes seconds for the shards of a trillion tokens.
        if not name.strip("./") or name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise ValueError(f"{file}: shard name {name!r} must be relative and beneath the manifest")
    if len(set(names)) < len(names):
        raise ValueError(f"{file}: a shard is named twice")
    for key in ("documents", "tokens"):
        if sum(getattr(shard, key) for shard in manifest.shards) != getattr(manifest, key):
            raise ValueError(f"{file}: {key} is not the sum over the shards")
    for key in ("eos_id", "mask_id", "pad_id"):
        if getattr(manifest, key) >= manifest.vocab_size:
            raise ValueError(f"{file}: {key} lies outside the vocabulary of {manifest.vocab_size}")


def _check_size(manifest: Manifest, shard: Shard) -> None:
    path = manifest.directory / shard.name
    if not path.is_file():
        raise ShardError(f"{path}: missing shard; restore the file or build the shards again")
    if path.stat().st_size != shard.bytes:
        raise ShardError(
            f"{path}: {path.stat().st_size} bytes instead of {shard.bytes}; restore the shard or build again"
        )


class ShardReader:
    """Random access to the documents of one shard, by its index.

    Attributes:
        index: structured array [documents] with `offset`, `tokens` and `crc32`.
    """

    def __init__(self, manifest: Manifest, number: int) -> None:
        """Map shard `number` into memory.

        Raises:
            ShardError: the shard or its index is missing, has another size, or they do not fit together.
        """
        self._shard = manifest.shards[number]
        self._dtype = manifest.token_dtype
        self.path = manifest.directory / self._shard.name
        _check_size(manifest, self._shard)
        self.index = self._load_index(manifest.directory / self._shard.index)
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Tars are padded to 512 bytes, so the whole file is one array of tokens; the headers are never read.
        self._tokens = np.frombuffer(mapped, dtype=self._dtype)
        self._starts = (self.index["offset"] // self._dtype.itemsize).astype(np.int64)

    def _load_index(self, path: Path) -> npt.NDArray[np.void]:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ShardError(f"{path}: cannot read the index ({error.strerror}); build the shards again") from error
        if hashlib.sha256(data).hexdigest() != self._shard.index_sha256:
            raise ShardError(f"{path}: the index does not match its hash; restore it or build the shards again")
        index: npt.NDArray[np.void] = np.load(path, allow_pickle=False)
        if index.dtype != INDEX_DTYPE or index.shape != (self._shard.documents,):
            raise ShardError(f"{path}: not an index of {self._shard.documents} documents; build the shards again")
        ends = index["offset"] + index["tokens"].astype(np.uint64) * np.uint64(self._dtype.itemsize)
        fits = int(index["tokens"].sum(dtype=np.uint64)) == self._shard.tokens and int(ends.max()) <= self._shard.bytes
        if not fits or (index["offset"] % self._dtype.itemsize).any():
            raise ShardError(f"{path}: the index does not fit {self.path.name}; build the shards again")
        return index

    def document(self, number: int, *, verify: bool = True) -> npt.NDArray[np.unsignedinteger]:
        """Tokens [n] of a document, a view of the file.

        Raises:
            DamagedDocumentError: under `verify`, its bytes do not match their crc32.
        """
        start = self._starts[number]
        tokens = self._tokens[start : start + self.index["tokens"][number]]
        if verify and zlib.crc32(tokens.data) != self.index["crc32"][number]:
            raise DamagedDocumentError(
                f"{self.path}: document {number} (bytes {start * self._dtype.itemsize} to "
                f"{start * self._dtype.itemsize + tokens.nbytes}) is damaged: its crc32 differs; restore the shard"
            )
        return tokens

    def blocks(self) -> Iterator[npt.NDArray[np.unsignedinteger]]:
        """Tokens of runs of documents that lie side by side, in file order."""
        ends = self._starts + self.index["tokens"]
        cuts = np.flatnonzero(self._starts[1:] != ends[:-1]) + 1
        for first, stop in zip([0, *cuts], [*cuts, len(ends)], strict=True):
            yield self._tokens[self._starts[first] : ends[stop - 1]]


def verify(manifest: Manifest) -> list[str]:
    """Check every hash, every document's crc32 and every token id of a corpus.

    Returns:
        One line per problem, naming the file and the document; empty for a sound corpus.
    """
    problems: list[str] = []
    for number, shard in enumerate(manifest.shards):
        try:
            reader = ShardReader(manifest, number)
        except ShardError as error:
            problems.append(str(error))
            continue
        damaged = _damaged_documents(reader, manifest.vocab_size)
        problems += damaged
        with reader.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != shard.sha256 and not damaged:
            problems.append(
                f"{reader.path}: damaged outside its documents (tar headers or lengths): its sha256 differs"
            )
    return problems


def _damaged_documents(reader: ShardReader, vocab_size: int) -> list[str]:
    problems = []
    for number in range(len(reader.index)):
        try:
            tokens = reader.document(number)
        except ShardError as error:
            problems.append(str(error))
            continue
        if tokens.size and int(tokens.max()) >= vocab_size:
            problems.append(f"{reader.path}: document {number} holds a token outside the vocabulary of {vocab_size}")
    return problems


def token_counts(manifest: Manifest) -> npt.NDArray[np.int64]:
    """Occurrences [vocab_size] of every token, one `<eos>` per document included."""
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    for number in range(len(manifest.shards)):
        for block in ShardReader(manifest, number).blocks():
            found = np.bincount(block, minlength=manifest.vocab_size)
            if len(found) > manifest.vocab_size:
                raise ValueError(
                    f"{manifest.directory}: a token lies outside the vocabulary; check it with `data verify`"
                )
            counts += found
    counts[manifest.eos_id] += manifest.documents
    return counts


def unigram_entropy(manifest: Manifest) -> float:
    """Entropy in nats per token of the corpus' token distribution, `<eos>` included: H = -sum_v p_v log p_v.

    A model that knows nothing but token frequencies has this cross-entropy on the corpus.
    """
    counts = token_counts(manifest)
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def unigram_cross_entropy(valid: Manifest, train: Manifest) -> float:
    """Cross-entropy in nats per token of `valid` under the token frequencies of `train`.

    H = -sum_v q_v log p_v with add-one smoothing, p_v = (n_v + 1) / (n + V), so that unseen tokens stay finite.

    Raises:
        ValueError: the two corpora were tokenised with different tokenizers.
    """
    if valid.tokenizer_sha256 != train.tokenizer_sha256:
        raise ValueError(f"{valid.directory} and {train.directory} were tokenised with different tokenizers")
    train_counts, valid_counts = token_counts(train) + 1, token_counts(valid)
    log_probabilities = np.log(train_counts / train_counts.sum())
    return float(-(valid_counts / valid_counts.sum() * log_probabilities).sum())


def document_lengths(manifest: Manifest) -> npt.NDArray[np.int64]:
    """Tokens [documents] of every document, in file order."""
    lengths = [ShardReader(manifest, number).index["tokens"] for number in range(len(manifest.shards))]
    return np.concatenate(lengths).astype(np.int64)

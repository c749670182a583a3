"""Writer of shards: tokenised documents in, a folder of tar shards with a manifest out, complete or not at all.

While it is written the folder is called NAME.partial; an interrupted build goes on from its last complete shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_md.batch import Int64Array
from megatron_md.data.answers import table_of
from megatron_md.data.entries import Rejection
from megatron_md.data.resume import (
    PROGRESS_NAME,
    BuildProgress,
    BuildState,
    load_state,
)
from megatron_md.data.shard_index import CHAT_INDEX_DTYPE, INDEX_DTYPE
from megatron_md.data.shards import (
    FORMAT,
    MANIFEST_NAME,
    REJECTED_NAME,
    Manifest,
    Shard,
    content_hash,
    load_manifest,
)
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.errors import UserError
from megatron_md.files import replace_file, write_synced

BLOCK_BYTES = 1 << 20
SHARD_TOKENS = 1 << 24
OWN_FILES = re.compile(
    r"shard-\d{6}\.(tar|index\.npy)|manifest\.json|rejected\.jsonl|progress\.json|\.(manifest|progress)\.json\.writing"
)

Tokens = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Tokenised:
    """A document's tokens [n], without `<eos>`.

    Attributes:
        text_bytes: size of its text in UTF-8.
        fingerprint: checksum of what was read, by which an interrupted build finds its place again.
        answers: of a dialogue, begin and end [runs, 2] of its answers in its tokens, at least one, ascending.
    """

    tokens: Tokens
    text_bytes: int
    fingerprint: int = 0
    answers: Int64Array | None = None

    @property
    def answer_tokens(self) -> int:
        """Tokens that belong to answers."""
        return 0 if self.answers is None else int(np.diff(self.answers).sum())


Batch = list[Tokenised | Rejection]


@dataclass(frozen=True)
class Vocabulary:
    """What a manifest says about its tokens.

    Attributes:
        token_bytes: bytes per stored token, 2 or 4; the fewest that hold every token unless given.
    """

    size: int
    eos_id: int
    mask_id: int
    pad_id: int
    tokenizer_sha256: str
    token_bytes: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """The vocabulary of a tokenizer."""
        return cls(
            tokenizer.vocab_size,
            tokenizer.eos_token_id,
            tokenizer.mask_token_id,
            tokenizer.pad_token_id,
            tokenizer.sha256,
        )

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """The type of `token_bytes` bytes; the smallest that holds every token unless given."""
        return np.dtype(f"<u{self.token_bytes or (2 if self.size <= 1 << 16 else 4)}")


OnProgress = Callable[[BuildProgress], None]


def write_corpus(
    batches: Iterable[Batch],
    vocabulary: Vocabulary,
    output_dir: str | Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    block_bytes: int = BLOCK_BYTES,
    source: dict[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    resume_from: BuildState | None = None,
) -> Manifest:
    """Write tokenised documents as shards under a manifest.

    Written into `output_dir` + ".partial" and renamed when complete; an earlier build in `output_dir` is replaced.
    When it fails, the partial folder stays if a shard in it is complete, for `interrupted_build`.

    Args:
        batches: tokenised documents and rejections in order.
        vocabulary: what they were tokenised with.
        output_dir: folder to create.
        shard_tokens: a shard is closed when it holds this many tokens.
        block_bytes: a tar member is closed when it holds this many bytes.
        source: free description, recorded in the manifest.
        on_progress: called after every batch.
        resume_from: what `interrupted_build` found; `batches` begin after its entries.

    Raises:
        UserError: `output_dir` holds something else or cannot be made, there is no document to write, or a token
            lies outside the vocabulary.
    """
    output_dir, partial = _folders(output_dir)
    state = resume_from
    if state is None:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{output_dir}: cannot be made ({error.strerror}); give another --output") from error
        state = BuildState(_settings_key(vocabulary, shard_tokens, block_bytes, source))
    try:
        writer = _CorpusWriter(partial, vocabulary, shard_tokens, block_bytes, state.shards)
        _write_batches(batches, writer, partial, state, on_progress)
        if not state.shards:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(state.progress.rejected.items()))
            raise UserError(
                f"{output_dir}: no document to write ({reasons or 'none found'}); check --input and --split"
            )
        write_manifest(partial, vocabulary, state.progress, state.shards, source or {})
    except BaseException:
        if not (partial / PROGRESS_NAME).exists():
            shutil.rmtree(partial)
        raise
    _replace(partial, output_dir)
    return load_manifest(output_dir)


def interrupted_build(
    vocabulary: Vocabulary,
    output_dir: str | Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    block_bytes: int = BLOCK_BYTES,
    source: dict[str, Any] | None = None,
) -> BuildState | None:
    """Where an interrupted build of the same settings stopped, at the end of a shard; None where there is none.

    Raises:
        UserError: `output_dir` or its partial folder holds something else, or a build with other settings.
    """
    _, partial = _folders(output_dir)
    return load_state(partial, _settings_key(vocabulary, shard_tokens, block_bytes, source))


def _folders(output_dir: str | Path) -> tuple[Path, Path]:
    """Where a build ends up, and where it is written."""
    output_dir = Path(os.path.abspath(output_dir))
    partial = output_dir.with_name(output_dir.name + ".partial")
    for folder in (output_dir, partial):
        _check_own(folder)
    return output_dir, partial


def _settings_key(vocabulary: Vocabulary, shard_tokens: int, block_bytes: int, source: dict[str, Any] | None) -> str:
    settings = {**asdict(vocabulary), "sizes": [shard_tokens, block_bytes], "source": source or {}}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _write_batches(
    batches: Iterable[Batch],
    writer: _CorpusWriter,
    folder: Path,
    state: BuildState,
    on_progress: OnProgress | None,
) -> None:
    with (folder / REJECTED_NAME).open("ab") as rejected:
        for batch in batches:
            for entry in batch:
                state.add(entry.fingerprint)
                if isinstance(entry, Rejection):
                    state.progress.rejected[entry.reason] += 1
                    rejected.write(_rejected_line(entry))
                    continue
                # Counted first: the state that is saved at the end of a shard includes the document that ended it.
                state.progress.documents += 1
                state.progress.tokens += entry.tokens.size
                state.progress.text_bytes += entry.text_bytes
                state.progress.answer_tokens += entry.answer_tokens
                if writer.add(entry):
                    rejected.flush()
                    os.fsync(rejected.fileno())
                    state.rejected_bytes = rejected.tell()
                    state.save(folder)
            if on_progress is not None:
                on_progress(state.progress)
    writer.close()


def _rejected_line(entry: Rejection) -> bytes:
    record = {"name": entry.name, "reason": entry.reason, **({"detail": entry.detail} if entry.detail else {})}
    return (json.dumps(record) + "\n").encode()


def write_manifest(
    folder: Path, vocabulary: Vocabulary, progress: BuildProgress, shards: list[Shard], source: dict[str, Any]
) -> None:
    """Write the manifest of these shards, in one step."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "dtype": vocabulary.token_dtype.name,
        "vocab_size": vocabulary.size,
        "eos_id": vocabulary.eos_id,
        "mask_id": vocabulary.mask_id,
        "pad_id": vocabulary.pad_id,
        "tokenizer_sha256": vocabulary.tokenizer_sha256,
        "documents": progress.documents,
        "tokens": progress.tokens,
        "text_bytes": progress.text_bytes,
        "source": {**source, "rejected": dict(sorted(progress.rejected.items()))},
        "shards": [asdict(shard) for shard in shards],
    }
    # Manifests of text say nothing of it, as they did before there were others: their hashes decide orders of rows.
    if progress.answer_tokens:
        content |= {"kind": "chat", "answer_tokens": progress.answer_tokens}
    content["sha256"] = content_hash(content)
    replace_file(folder / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")


def _check_own(folder: Path) -> None:
    """Refuse to touch anything that a build did not write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: exists and is not a folder; give another --output")
    foreign = sorted(entry.name for entry in folder.iterdir() if not OWN_FILES.fullmatch(entry.name))
    if foreign:
        raise UserError(f"{folder}: holds files that are no shards ({foreign[0]}); give an empty or new --output")


def _replace(partial: Path, output_dir: Path) -> None:
    """Put the complete folder in place of an earlier one."""
    old = output_dir.with_name(output_dir.name + ".old")
    if output_dir.exists():
        _check_own(old)
        shutil.rmtree(old, ignore_errors=True)
        output_dir.rename(old)
    partial.rename(output_dir)
    (output_dir / PROGRESS_NAME).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


class _CorpusWriter:
    """Spreads documents over shards."""

    def __init__(
        self, folder: Path, vocabulary: Vocabulary, shard_tokens: int, block_bytes: int, shards: list[Shard]
    ) -> None:
        self._folder, self._vocabulary = folder, vocabulary
        self._shard_tokens, self._block_bytes = shard_tokens, block_bytes
        self._shards = shards
        self._writer: _ShardWriter | None = None

    def add(self, document: Tokenised) -> bool:
        """Append a document; True when it ended a shard."""
        tokens = document.tokens
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocabulary.size:
            raise UserError(f"{self._folder}: a token lies outside the vocabulary of {self._vocabulary.size}")
        if self._writer is None:
            self._writer = _ShardWriter(self._folder, len(self._shards), self._block_bytes)
        self._writer.add(tokens.astype(self._vocabulary.token_dtype), document.answers)
        if self._writer.tokens < self._shard_tokens:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Finish the open shard, if any."""
        if self._writer is not None:
            self._shards.append(self._writer.close())
            self._writer = None


class _ShardWriter:
    """Writes one shard and its index."""

    def __init__(self, folder: Path, number: int, block_bytes: int) -> None:
        self._path = folder / f"shard-{number:06d}.tar"
        self._file = self._path.open("w+b")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._number, self._block_bytes = number, block_bytes
        self._block: list[Tokens] = []
        self._runs: list[npt.NDArray[np.void]] = []  # of the documents of the block
        self._held = self._blocks = 0
        self._index: list[tuple[int, ...]] = []
        self.tokens = 0

    def add(self, tokens: Tokens, answers: Int64Array | None) -> None:
        """Append a document."""
        if answers is not None:
            self._runs.append(table_of(len(self._block), answers))
        self._block.append(tokens)
        self._held += tokens.nbytes
        self.tokens += tokens.size
        if self._held >= self._block_bytes:
            self._flush()

    def close(self) -> Shard:
        """Finish the tar, write the index, and describe both."""
        self._flush()
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        self._file.close()
        dtype = INDEX_DTYPE if len(self._index[0]) == len(INDEX_DTYPE.fields or ()) else CHAT_INDEX_DTYPE
        return describe_shard(self._path, np.array(self._index, dtype), sha256)

    def _flush(self) -> None:
        if not self._block:
            return
        key = f"{self._number:06d}-{self._blocks:06d}"
        entries: list[tuple[int, ...]] = list(_places(self._tar.offset + tarfile.BLOCKSIZE, self._block))
        self._add_member(f"{key}.tokens.bin", b"".join(tokens.tobytes() for tokens in self._block))
        lengths = np.array([tokens.size for tokens in self._block], dtype="<u4")
        self._add_member(f"{key}.lengths.bin", lengths.tobytes())
        if self._runs:
            runs = _places(self._tar.offset + tarfile.BLOCKSIZE, self._runs)
            entries = [document + answers for document, answers in zip(entries, runs, strict=True)]
            self._add_member(f"{key}.answers.bin", np.concatenate(self._runs).tobytes())
        self._index += entries
        self._block, self._runs, self._held = [], [], 0
        self._blocks += 1

    def _add_member(self, name: str, data: bytes) -> None:
        # TarInfo's defaults (time 0, owner 0, mode 644) keep the bytes the same everywhere.
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


def _places(offset: int, parts: Sequence[npt.NDArray[Any]]) -> Iterator[tuple[int, int, int]]:
    """Offset, number of items and crc32 of arrays that are written one after the other."""
    for part in parts:
        yield offset, part.size, zlib.crc32(part.tobytes())
        offset += part.nbytes


def describe_shard(path: Path, index: npt.NDArray[np.void], sha256: str) -> Shard:
    """Write the index of a complete shard beside it, and describe both; names are relative to its folder."""
    data = io.BytesIO()
    np.lib.format.write_array(data, index, version=(1, 0), allow_pickle=False)
    index_path = path.with_suffix(".index.npy")
    write_synced(index_path, data.getvalue())
    return Shard(
        name=path.name,
        documents=len(index),
        tokens=int(index["tokens"].sum(dtype=np.uint64)),
        bytes=path.stat().st_size,
        sha256=sha256,
        index=index_path.name,
        index_sha256=hashlib.sha256(data.getvalue()).hexdigest(),
    )

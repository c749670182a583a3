"""Corpora: Python's own standard library (the embedded corpus), files or folders of text, tokens and tables.

A corpus is a stream of documents in a fixed order. What cannot be read becomes a `Rejection` with its reason,
so that nothing disappears without a trace.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_md.data.encoding import WAY_OUT
from megatron_md.data.entries import Document, Entry, InputError, Rejection
from megatron_md.data.readers import HUB, NOT_DECODABLE, Reading, read_file, read_hub
from megatron_md.errors import UserError
from megatron_md.messages import tell

Split = Literal["all", "train", "valid"]

EMBEDDED = "embedded"
VALIDATION_FRACTION = 0.05
# Tests are left out because they hold broken and synthetic text; `_sysconfigdata*` because it names the machine.
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")


def documents(
    inputs: Sequence[str | Path] = (EMBEDDED,),
    split: Split = "all",
    *,
    reading: Reading | None = None,
    skip_damaged: bool = False,
) -> Iterator[Entry]:
    """Read the documents of a corpus in a fixed order; the first that is in another encoding is told.

    Args:
        inputs: `embedded` for Python's standard library; `datasets:NAME[:CONFIG[:SPLIT]]` for a data set of the
            Hugging Face hub; files; folders, of which every file with a known suffix is read. A text file is one
            document; so is a line of `.jsonl`, a row of `.parquet`, a member of `.tar`; `.idx` and `.bin` are
            Megatron's tokenised data sets. `.gz` and `.zst` are decompressed.
        split: `train` and `valid` divide the documents by a hash of their names (about 5 % is `valid`).
        reading: text field, largest document and encoding.
        skip_damaged: a damaged file becomes one rejection with what could not be read of it, instead of an error.

    Raises:
        UserError: an input does not exist, holds no file of a known kind, or cannot be read for want of a package.
        InputError: a file is damaged.
    """
    reading, undecodable = reading or Reading(), 0
    for source in inputs:
        if str(source).startswith(HUB):
            entries = read_hub(str(source), reading)
        else:
            entries = _read_files(source, reading, skip_damaged)
        for entry in entries:
            if split != "all" and in_validation(entry.name) != (split == "valid"):
                continue
            if isinstance(entry, Rejection) and entry.reason == NOT_DECODABLE and entry.detail:
                undecodable += 1
                if undecodable == 1:
                    folder = Path(source) if Path(source).is_dir() else Path(source).parent
                    tell(f"megatron-md: {folder / entry.name}: {entry.detail}, so that it is left out; {WAY_OUT}")
            yield entry
    if undecodable > 1:
        tell(f"megatron-md: {undecodable} documents are left out that are not in the encoding")


def in_validation(name: str) -> bool:
    """Whether the document of this name belongs to the validation split; a pure function of the name."""
    word = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "little")
    return word < VALIDATION_FRACTION * 2**64


def texts(corpus: Iterable[Entry]) -> Iterator[Document]:
    """The documents of a corpus that are text."""
    return (document for document in corpus if isinstance(document, Document))


def _read_files(source: str | Path, reading: Reading, skip_damaged: bool) -> Iterator[Entry]:
    for name, path in _files(source, reading):
        try:
            yield from read_file(name, path, reading)
        except InputError as error:
            if not skip_damaged:
                raise
            yield Rejection(name, error.reason, str(error))


def _files(source: str | Path, reading: Reading) -> Iterator[tuple[str, Path]]:
    """Name and path of every file of an input, sorted by name."""
    if str(source) == EMBEDDED and not reading.is_chat:
        yield from _embedded_files()
        return
    path = Path(source)
    if path.is_file():
        known = reading.suffixes
        if reading.is_chat and not path.name.endswith(known):
            raise UserError(f"{path}: no file of dialogues, which are {', '.join(known)}")
        if not path.name.endswith((*known, ".bin")):
            raise UserError(f"{path}: unknown kind of file, none of {', '.join(known)}; give text the name *.txt")
        yield path.name, path
    elif path.is_dir():
        folder = path.resolve()
        files = sorted(
            file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.name.endswith(reading.suffixes)
        )
        if not files:
            raise UserError(f"{path}: no text file in this folder; looked for {', '.join(reading.suffixes)}")
        yield from ((name, folder / name) for name in files if (folder / name).is_file())
    else:
        raise UserError(f"{path}: no such file or folder; give files, folders of them, or '{EMBEDDED}'")


def _embedded_files() -> Iterator[tuple[str, Path]]:
    """The sources of Python's standard library without its tests, some 12 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py")):
        parts = name.split("/")
        if EXCLUDED_FOLDERS.isdisjoint(parts) and not any(part.startswith(EXCLUDED_PREFIXES) for part in parts):
            yield name, root / name

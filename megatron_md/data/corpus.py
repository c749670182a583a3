"""Text corpora: Python's own standard library (the embedded corpus), and files or folders of text.

A corpus is a stream of documents in a fixed order. What cannot be read becomes a `Rejection` with its reason,
so that nothing disappears without a trace.
"""

from __future__ import annotations

import hashlib
import io
import json
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["all", "train", "valid"]

EMBEDDED = "embedded"
VALIDATION_FRACTION = 0.05
TEXT_SUFFIXES = (".jsonl", ".md", ".py", ".txt")
# Tests are left out because they hold broken and synthetic text; `_sysconfigdata*` because it names the machine.
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Document:
    """One document: its name, unique within the corpus, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Rejection:
    """A document that is left out, and why."""

    name: str
    reason: str


def documents(inputs: Sequence[str | Path] = (EMBEDDED,), split: Split = "all") -> Iterator[Document | Rejection]:
    """Read the documents of a corpus in a fixed order.

    Args:
        inputs: `embedded` for Python's standard library; text files; folders, of which every `.txt`, `.md`, `.py`
            and `.jsonl` file is read. A file is one document; a line of a `.jsonl` file is one, in its `text` field.
        split: `train` and `valid` divide the documents by a hash of their names (about 5 % is `valid`).

    Raises:
        ValueError: an input does not exist or holds no text file.
    """
    for source in inputs:
        for name, path in _text_files(source):
            for document in _read(name, path):
                if split == "all" or in_validation(document.name) == (split == "valid"):
                    yield document


def in_validation(name: str) -> bool:
    """Whether the document of this name belongs to the validation split; a pure function of the name."""
    word = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "little")
    return word < VALIDATION_FRACTION * 2**64


def texts(corpus: Iterable[Document | Rejection]) -> Iterator[Document]:
    """The readable documents of a corpus."""
    return (document for document in corpus if isinstance(document, Document))


def _text_files(source: str | Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every file of an input, sorted by name."""
    if str(source) == EMBEDDED:
        yield from _embedded_files()
        return
    path = Path(source)
    if path.is_file():
        yield path.name, path
    elif path.is_dir():
        folder = path.resolve()
        files = sorted(
            file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.suffix in TEXT_SUFFIXES
        )
        if not files:
            raise ValueError(f"{path}: no text file in this folder; looked for {', '.join(TEXT_SUFFIXES)}")
        yield from ((name, folder / name) for name in files if (folder / name).is_file())
    else:
        raise ValueError(f"{path}: no such file or folder; give text files, folders of them, or '{EMBEDDED}'")


def _embedded_files() -> Iterator[tuple[str, Path]]:
    """The sources of Python's standard library without its tests, some 12 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py")):
        parts = name.split("/")
        if EXCLUDED_FOLDERS.isdisjoint(parts) and not any(part.startswith(EXCLUDED_PREFIXES) for part in parts):
            yield name, root / name


def _read(name: str, path: Path) -> Iterator[Document | Rejection]:
    """The documents of one file; line ends stay as they are."""
    data = path.read_bytes()
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0] if path.suffix == ".py" else "utf-8-sig"
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        yield Rejection(name, "not decodable")
        return
    if path.suffix != ".jsonl":
        yield Document(name, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _read_json_line(f"{name}#{number}", line)


def _read_json_line(name: str, line: str) -> Document | Rejection:
    try:
        record = json.loads(line)
    except ValueError:
        return Rejection(name, "malformed JSON")
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        return Rejection(name, "no text field")
    return Document(name, record["text"])

"""Readers of input files: text, JSON lines, Parquet, tars of text, data sets of the Hugging Face hub.

All stream: memory is bounded by the largest document that is allowed, whatever the file claims or decompresses to.
Nothing is unpickled and nothing is executed. What cannot be a document becomes a `Rejection`; a file that is damaged
as a whole raises an `InputError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_md.data.decompression import SUFFIXES as COMPRESSED_SUFFIXES
from megatron_md.data.decompression import open_stream
from megatron_md.data.encoding import Encoding, NotDecodableError
from megatron_md.data.entries import Document, Entry, InputError, Record, Rejection
from megatron_md.data.megatron_indexed import read_indexed
from megatron_md.data.optional import optional_package
from megatron_md.data.tar import read_members
from megatron_md.errors import UserError

HUB = "datasets:"
DOCUMENT_BYTES = 1 << 24
TEXT_SUFFIXES = (".md", ".py", ".txt")
LINES_SUFFIXES = (".jsonl", ".ndjson")
STREAMED = (*LINES_SUFFIXES, *TEXT_SUFFIXES, ".tar")
SUFFIXES = (*STREAMED, *(kind + packed for kind in STREAMED for packed in COMPRESSED_SUFFIXES), ".tgz",
            ".idx", ".parquet")  # fmt: skip
PARQUET_ROWS = 64
# Rows of a group are decoded page by page, but a page may be as large as the group's column.
LARGEST_ROW_GROUP = 1 << 31

# Fields of a chat data set's records, by format.
DIALOGUE_KEYS = (("messages",), ("prompt", "completion"), ("conversations",))
CHAT_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix.startswith((*LINES_SUFFIXES, ".parquet", ".tar", ".tgz")))

TOO_LONG = "too long"
NOT_DECODABLE = "not decodable"
NO_TEXT = "no text field"


@dataclass(frozen=True)
class Reading:
    """How documents are read.

    Attributes:
        text_key: field of a JSON record, or column of a table, that holds the text.
        document_bytes: longest document in bytes (for JSON lines: longest line); longer ones are rejected.
        is_chat: read the records of dialogues, whole, instead of texts.
        encoding: of text files and JSON; tables are in UTF-8 by their format.
    """

    text_key: str = "text"
    document_bytes: int = DOCUMENT_BYTES
    is_chat: bool = False
    encoding: Encoding = field(default_factory=Encoding)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files that can be read."""
        return CHAT_SUFFIXES if self.is_chat else SUFFIXES


def read_file(name: str, path: Path, reading: Reading) -> Iterator[Entry]:
    """Documents of a file, by its suffix.

    Raises:
        InputError: the file is damaged.
        UserError: it cannot be opened, or a package that reads it is not installed.
    """
    if path.suffix in (".idx", ".bin"):
        yield from read_indexed(name, path)
        return
    if path.suffix == ".parquet":
        yield from _read_parquet(name, path, reading)
        return
    with open_stream(path) as stream:
        plain = name.removesuffix(".gz").removesuffix(".zst")
        if plain.endswith((".tar", ".tgz")):
            yield from _read_tar(name, path, stream, reading)
        else:
            yield from _read_stream(name, plain, stream, reading)


def _read_stream(name: str, plain_name: str, stream: BinaryIO, reading: Reading) -> Iterator[Entry]:
    if plain_name.endswith(LINES_SUFFIXES):
        yield from _read_lines(name, stream, reading)
        return
    data = stream.read(reading.document_bytes + 1)
    if len(data) > reading.document_bytes:
        yield Rejection(name, TOO_LONG)
        return
    try:
        yield Document(name, reading.encoding.decode(data, is_python=plain_name.endswith(".py")))
    except NotDecodableError as error:
        yield Rejection(name, NOT_DECODABLE, str(error))


def _read_lines(name: str, stream: BinaryIO, reading: Reading) -> Iterator[Entry]:
    """JSON lines; each is a document, empty lines are none."""
    reading.encoding.check_lines(name)
    number = 0
    while line := stream.readline(reading.document_bytes + 1):
        number += 1
        if len(line) > reading.document_bytes and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(reading.document_bytes)
            yield Rejection(f"{name}#{number}", TOO_LONG)
            continue
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield _read_record(f"{name}#{number}", line, reading)


def _read_record(name: str, data: bytes, reading: Reading) -> Entry:
    try:
        record = json.loads(reading.encoding.decode(data))
    except NotDecodableError as error:
        return Rejection(name, NOT_DECODABLE, str(error))
    except (ValueError, RecursionError):
        return Rejection(name, "malformed JSON")
    if reading.is_chat:
        return Record(name, record) if isinstance(record, dict) else Rejection(name, "not a JSON object")
    text = record.get(reading.text_key) if isinstance(record, dict) else None
    return Document(name, text) if isinstance(text, str) else Rejection(name, NO_TEXT)


def _read_tar(name: str, path: Path, stream: BinaryIO, reading: Reading) -> Iterator[Entry]:
    """Text members are documents, `.json` members have them in their text field, `.jsonl` members in their lines."""
    for member, data in read_members(stream, path):
        document = f"{name}/{member.name}"
        if member.problem is not None:
            if not member.is_directory or member.problem == "unsafe name":
                yield Rejection(document, member.problem)
        elif member.name.endswith(LINES_SUFFIXES if reading.is_chat else (*TEXT_SUFFIXES, *LINES_SUFFIXES)):
            yield from _read_stream(document, member.name, data, reading)
        elif not member.name.endswith(".json"):
            yield Rejection(document, "not text", member.name.rsplit("/")[-1].partition(".")[2])
        elif member.size > reading.document_bytes:
            yield Rejection(document, TOO_LONG)
        else:
            yield _read_record(document, data.read(), reading)


def _read_parquet(name: str, path: Path, reading: Reading) -> Iterator[Entry]:
    """Rows of a Parquet file, a few at a time."""
    arrow, parquet = optional_package("pyarrow", str(path)), optional_package("pyarrow.parquet", str(path))
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        types = {field.name: field.type for field in file.schema_arrow}
        columns = [file.metadata.schema.column(number).path for number in range(file.metadata.num_columns)]
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise InputError(f"{path}: not a readable Parquet file ({_one_line(error)}); restore it") from error
    with file:
        yield from _parquet_rows(name, path, file, _wanted_columns(path, types, columns, reading), reading)


def _wanted_columns(path: Path, types: dict[str, Any], columns: list[str], reading: Reading) -> list[str]:
    """The columns that hold the text, or the dialogues.

    Raises:
        InputError, UserError: there is no such column, or it holds something else.
    """
    if reading.is_chat:
        return _dialogue_keys(str(path), types)
    if reading.text_key not in columns:
        raise UserError(f"{path}: no column {reading.text_key!r}; it has {', '.join(columns)}: say --text-key")
    kind = types.get(reading.text_key)
    if str(getattr(kind, "value_type", kind)) not in ("string", "large_string", "string_view", "null"):
        raise InputError(f"{path}: column {reading.text_key!r} holds {kind}, not text: say --text-key")
    return [reading.text_key]


def _dialogue_keys(where: str, names: Iterable[str]) -> list[str]:
    """Which of a table's columns hold its dialogues.

    Raises:
        UserError: none does.
    """
    names = list(names)
    found = [key for keys in DIALOGUE_KEYS if set(keys) <= set(names) for key in keys]
    if not found:
        known = "; ".join(" and ".join(keys) for keys in DIALOGUE_KEYS)
        raise UserError(f"{where}: no dialogues: its columns are {', '.join(names)[:300]}, known are {known}")
    return found


def _parquet_rows(name: str, path: Path, file: Any, wanted: list[str], reading: Reading) -> Iterator[Entry]:
    number, arrow = 0, optional_package("pyarrow", str(path))
    paths = [file.metadata.schema.column(leaf).path for leaf in range(file.metadata.num_columns)]
    # A column of lists of objects lies in several, named after it.
    leaves = [leaf for leaf, path in enumerate(paths) if path in wanted or path.partition(".")[0] in wanted]
    for group in range(file.num_row_groups):
        size = sum(file.metadata.row_group(group).column(leaf).total_uncompressed_size for leaf in leaves)
        if size > LARGEST_ROW_GROUP:
            raise InputError(f"{path}: row group {group} holds {size} bytes of text; write it in smaller groups")
        rows = file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=wanted, use_threads=False)
        while True:
            try:
                batch = next(rows, None)
            except (OSError, ValueError, arrow.ArrowException) as error:
                raise InputError(
                    f"{path}: row group {group} is damaged after row {number} ({_one_line(error)}); restore the file"
                ) from error
            if batch is None:
                break
            for values in zip(*map(batch.column, wanted), strict=True):
                number += 1
                yield _parquet_row(f"{name}#{number}", dict(zip(wanted, values, strict=True)), reading)
    if number != file.metadata.num_rows:
        raise InputError(f"{path}: {number} rows instead of {file.metadata.num_rows}; restore the file")


def _parquet_row(name: str, row: dict[str, Any], reading: Reading) -> Entry:
    try:
        return _checked(name, {key: value.as_py() for key, value in row.items()}, reading)
    except UnicodeDecodeError:
        return Rejection(name, NOT_DECODABLE)


def _checked(name: str, row: dict[str, Any], reading: Reading) -> Entry:
    if reading.is_chat:
        return Record(name, row)
    text = row.get(reading.text_key)
    if not isinstance(text, str):
        return Rejection(name, NO_TEXT)
    return Rejection(name, TOO_LONG) if len(text) > reading.document_bytes else Document(name, text)


def read_hub(source: str, reading: Reading) -> Iterator[Entry]:
    """Rows of `datasets:NAME[:CONFIG[:SPLIT]]`, streamed; the split is `train` unless given.

    Raises:
        UserError: it names no data set, or `datasets` is not installed or cannot load it.
    """
    name, config, split, *rest = (*source.removeprefix(HUB).split(":"), "", "")
    if not name or any(rest):
        raise UserError(f"{source}: names no data set; write {HUB}NAME[:CONFIG[:SPLIT]]")
    datasets = optional_package("datasets", source)
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        names = rows.column_names
        if reading.is_chat:
            entries = iter(rows.select_columns(_dialogue_keys(source, names)) if names is not None else rows)
        elif names is not None and reading.text_key not in names:
            raise KeyError(f"no column {reading.text_key!r} among {', '.join(names)}: say --text-key")
        else:
            entries = iter(rows.select_columns([reading.text_key]))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{source}: cannot be loaded: {_one_line(error)}") from error
    for number, row in enumerate(entries, start=1):
        yield _checked(f"{name}#{number}", row, reading)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())[:200]

"""Strict reading of tar files from front to back: whatever is not sound is named, nothing is skipped in silence.

Python's `tarfile` (and whatever builds on it) takes a damaged header in the middle of a file for its end. Here
only single headers are parsed by it. Nothing is ever written to disk or decoded.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from megatron_md.data.entries import InputError

BLOCK = tarfile.BLOCKSIZE
CHUNK_BYTES = 1 << 20
LARGEST_MEMBER = 1 << 40
LARGEST_EXTENDED_HEADER = 1 << 16
EXTENDED_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class TarError(InputError):
    """A tar file is damaged; the message names the file, the place and the member before it.

    Attributes:
        problem: what is wrong.
        offset: at which byte of the (decompressed) file.
    """

    def __init__(self, path: Path, problem: str, offset: int, previous: str | None) -> None:
        after = "before any member" if previous is None else f"after member {previous!r}"
        super().__init__(f"{path}: {problem} at byte {offset}, {after}; restore the file", "damaged tar")
        self.problem, self.offset = problem, offset


class Readable(Protocol):
    """What can be read from front to back."""

    def read(self, count: int, /) -> bytes:
        """The next `count` bytes, fewer only at the end."""


@dataclass(frozen=True)
class Member:
    """One member of a tar file.

    Attributes:
        name: its name.
        offset: byte at which its data begins.
        size: bytes of data.
        is_directory: whether it is a directory without data.
        problem: why it must not be used (not a regular file, an unsafe name), or None.
    """

    name: str
    offset: int
    size: int
    is_directory: bool = False
    problem: str | None = None


def read_members(stream: Readable, path: Path) -> Iterator[tuple[Member, BinaryIO]]:
    """Members of a tar file with their data, which is to be read before the next member is asked for.

    Directories and members with a `problem` come too; it is for the caller to leave them out.

    Raises:
        TarError: a header's checksum is wrong, the file is cut (in a header, in data, or at a member boundary,
            where the end marker is missing), bytes follow the end marker, or a size is beyond belief.
    """
    reader = _Reader(stream, path)
    extended: dict[str, str] = {}
    while (info := reader.header()) is not None:
        if info.type in EXTENDED_HEADERS:
            extended.update(_extended_header(reader, info))
            continue
        member = _member(reader, info, extended)
        extended = {}
        data = _Data(reader, member)
        yield member, io.BufferedReader(data)
        data.skip()
        reader.skip(-member.size % BLOCK, member.name)
        reader.previous = member.name
    if extended:
        raise reader.error("an extended header without its member", reader.offset)


class _Reader:
    """A stream that knows where it is and what came before."""

    def __init__(self, stream: Readable, path: Path) -> None:
        self._stream, self._path = stream, path
        self.offset = 0
        self.previous: str | None = None

    def error(self, problem: str, offset: int) -> TarError:
        return TarError(self._path, problem, offset, self.previous)

    def read(self, count: int) -> bytes:
        data = self._stream.read(count)
        self.offset += len(data)
        return data

    def read_data(self, count: int, name: str) -> bytes:
        """Some bytes of a member's data, at most `count`."""
        data = self.read(min(count, CHUNK_BYTES))
        if not data:
            raise self.error(f"the file ends inside member {name!r}, whose header promises {count} bytes more",
                             self.offset)  # fmt: skip
        return data

    def skip(self, count: int, name: str) -> None:
        while count:
            count -= len(self.read_data(count, name))

    def header(self) -> tarfile.TarInfo | None:
        """The next header; None at a sound end of the file."""
        start = self.offset
        block = self.read(BLOCK)
        if not block:
            raise self.error("no end marker: the file is cut at a member boundary", start)
        if len(block) < BLOCK:
            raise self.error("the file ends inside a header", start)
        if not any(block):
            self._check_end(start)
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise self.error(f"damaged header ({error})", start) from error
        if not 0 <= info.size <= LARGEST_MEMBER:
            raise self.error(f"a header declares {info.size} bytes of data", start)
        return info

    def _check_end(self, start: int) -> None:
        """The end marker is two zero blocks; zeros may follow, up to the end of a record."""
        zeros = BLOCK
        while data := self.read(CHUNK_BYTES):
            if any(data):
                raise self.error("zeros and then further bytes: a zeroed member, or bytes after the end marker", start)
            zeros += len(data)
        if zeros < 2 * BLOCK:
            raise self.error("the end marker is incomplete", start)
        if zeros >= 2 * BLOCK + tarfile.RECORDSIZE:
            raise self.error(f"{zeros} zero bytes at the end, more than an end marker: a zeroed member", start)


class _Data(io.RawIOBase):
    """The data of one member."""

    def __init__(self, reader: _Reader, member: Member) -> None:
        self._reader, self._name, self._left = reader, member.name, member.size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            return 0
        data = self._reader.read_data(min(len(buffer), self._left), self._name)
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def skip(self) -> None:
        self._reader.skip(self._left, self._name)
        self._left = 0


def _extended_header(reader: _Reader, info: tarfile.TarInfo) -> dict[str, str]:
    """What a pax or GNU header says about the member after it."""
    start = reader.offset - BLOCK
    if info.size > LARGEST_EXTENDED_HEADER:
        raise reader.error(f"an extended header of {info.size} bytes", start)
    data = b""
    while len(data) < info.size:
        data += reader.read_data(info.size - len(data), info.name)
    reader.skip(-info.size % BLOCK, info.name)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if info.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    records: dict[str, str] = {}
    while data:
        # "LENGTH KEY=VALUE\n", where LENGTH counts the whole record.
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) + 2 < int(length[:9]) <= len(data):
            raise reader.error("a malformed extended header", start)
        record, data = rest[: int(length) - len(length) - 2], data[int(length) :]
        key, _, value = record.partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    if info.type == tarfile.XGLTYPE and not {"path", "size"}.isdisjoint(records):
        raise reader.error("a global header with a path or size", start)
    return records if info.type == tarfile.XHDTYPE else {}


def _member(reader: _Reader, info: tarfile.TarInfo, extended: dict[str, str]) -> Member:
    size = extended.get("size", str(info.size))
    if not size.isdecimal() or len(size) > 18 or int(size) > LARGEST_MEMBER:
        raise reader.error(f"a header declares {size[:30]} bytes of data", reader.offset - BLOCK)
    name = extended.get("path", info.name)
    is_sparse = any(key.startswith("GNU.sparse") for key in extended)
    is_regular = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not is_sparse
    problem = None if is_regular else "not a regular file"
    if not name or name.startswith("/") or ".." in name.split("/") or "\\" in name or not name.isprintable():
        problem = "unsafe name"
    # Links, devices and directories have no data, whatever their size field says (POSIX ustar).
    has_data = info.type not in (
        tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE
    )  # fmt: skip
    return Member(name, reader.offset, int(size) if has_data else 0, info.type == tarfile.DIRTYPE, problem)

"""Reading plain, gzip and zstd files as streams of bounded memory that notice a cut and a decompression bomb."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from megatron_md.data.entries import InputError
from megatron_md.data.optional import optional_package
from megatron_md.errors import UserError

SUFFIXES = (".gz", ".zst")
# Text compresses 3 to 10 times; 200 times is beyond any corpus, and gzip reaches 1,032.
LARGEST_RATIO = 200
ALWAYS_ALLOWED = 64 << 20
BUFFER_BYTES = 1 << 18
# A zstd block of 4 bytes can stand for 128 KiB, so the compressed side is read in small steps.
ZSTD_STEP = 1 << 10
ZSTD_WINDOW = 1 << 27


def open_stream(path: Path) -> BinaryIO:
    """Open a file for reading from front to back; `.gz`, `.tgz` and `.zst` are decompressed on the way.

    Reading raises an `InputError` where the compressed data is damaged or cut, or grows beyond 200 times its size.

    Raises:
        UserError: the file cannot be opened, or zstandard is not installed.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if path.name.endswith((".gz", ".tgz")):
        return io.BufferedReader(_Bounded(gzip.GzipFile(fileobj=file), path, file), BUFFER_BYTES)
    if path.name.endswith(".zst"):
        return io.BufferedReader(_Bounded(_Zstd(file, path), path, file), BUFFER_BYTES)
    return file


class _Bounded(io.RawIOBase):
    """A decompressing reader with a limit on what comes out."""

    def __init__(self, source: Any, path: Path, file: BinaryIO) -> None:
        self._source, self._path, self._file = source, path, file
        self._read = 0
        self._limit = ALWAYS_ALLOWED + LARGEST_RATIO * path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            # Not `read`: it would keep back what came before a damage.
            data = self._source.read1(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{self._path}: damaged or cut compressed data after {self._read} bytes of content ({error}); "
                "restore the file"
            ) from error
        self._read += len(data)
        if self._read > self._limit:
            raise InputError(
                f"{self._path}: decompresses to more than {LARGEST_RATIO} times its size: a decompression bomb, "
                "or no text; leave the file out, or decompress it yourself",
                "decompression bomb",
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        super().close()
        self._file.close()


class _Zstd:
    """Reads zstd frames; unlike the library's own reader, it notices that the last frame was cut."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        zstandard = optional_package("zstandard", str(path))
        self._file, self._error = file, zstandard.ZstdError
        self._new_frame = lambda: zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def read1(self, count: int) -> memoryview:
        while not self._ready:
            data = self._compressed or self._file.read(ZSTD_STEP)
            self._compressed = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame is incomplete")
                return self._ready
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from error
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        part, self._ready = self._ready[:count], self._ready[count:]
        return part

"""Writing files so that a crash or a full disk never leaves half of one under its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there replaces `path` at once when the block ends well.

    Its content is on disk before it gets its name. If the block raises, `path` stays as it was and the temporary file
    goes.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see the old or the new content, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def append(path: Path, text: str) -> None:
    """Add text to the end of a file: all of it or, where an OSError is raised, nothing."""
    with path.open("ab", buffering=0) as file:
        start, left = file.tell(), memoryview(text.encode())
        try:
            while left:
                left = left[os.write(file.fileno(), left) :]
        except OSError:
            file.truncate(start)
            raise


def write_synced(path: Path, content: str | bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

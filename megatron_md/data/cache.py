"""The node's cache of remote files: whole files named by their SHA-256, shared by all processes, capped in bytes.

    <sha256>         a complete file; whoever reads it holds a shared lock on it for as long
    <sha256>.part    a download; whoever writes it holds an exclusive lock, and renames it when its hash is right
    lock             held while room is made and while a file is renamed

A file that can be locked exclusively is therefore not in use (or was left by a process that died) and may be evicted,
the one that was opened longest ago first. Locks are `flock`s, which the system drops with their process. Nothing is
synced to the disk: every file is hashed again when it is opened, so one that a crash has cut is fetched again.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import IO

from megatron_md.config import DataConfig
from megatron_md.data.packing import RowOrder
from megatron_md.data.remote import RemoteError, RemoteFile, download

logger = logging.getLogger(__name__)

OWN_FILES = re.compile(r"[0-9a-f]{64}(\.part)?")
LOCK_NAME = "lock"
OPEN_ATTEMPTS = 5
PARALLEL_DOWNLOADS = 4
WINDOWS_HELD = 3  # a stream keeps two windows open while it opens or prefetches the next


def default_directory() -> Path:
    """`megatron-md` under the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-md"


@dataclass(frozen=True)
class Cache:
    """Where remote files are kept, and how many bytes of them at most."""

    directory: Path = field(default_factory=default_directory)
    max_bytes: int = DataConfig.cache_bytes

    @classmethod
    def of(cls, data: DataConfig) -> Cache:
        """The cache that a config asks for."""
        return cls(Path(data.cache_dir) if data.cache_dir is not None else default_directory(), data.cache_bytes)

    def open(self, file: RemoteFile) -> BufferedReader:
        """Open a file, fetching it where the cache lacks it or holds it damaged.

        It is not evicted as long as the returned file, or a mapping of it, is open.

        Raises:
            RemoteError: it cannot be fetched, or the cache has no room for it.
        """
        path = self.directory / file.sha256
        for _ in range(OPEN_ATTEMPTS):
            opened = _open_shared(path)
            if opened is None:
                self.fetch(file)
                continue
            if hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256:
                opened.seek(0)
                return opened
            logger.warning("%s: the cached file of %s is damaged; fetching it again", path, file.url)
            if _is_at(opened, path):
                path.unlink(missing_ok=True)
            opened.close()
        raise RemoteError(
            f"{path}: the cached file of {file.url} does not stay as it was written; "
            "check that disk, raise data.cache_bytes, or set data.cache_dir"
        )

    def fetch(self, file: RemoteFile) -> None:
        """Bring a file into the cache unless it is there; waits where another process does so already.

        Raises:
            RemoteError: as `open`.
        """
        path = self.directory / file.sha256
        part = path.with_suffix(".part")
        if _touch(path):
            return
        self._make_directory()
        with _exclusive(part) as target:
            try:
                if not _touch(path):
                    self._make_room(target, file.max_bytes)
                    download(file, target)
                    with _exclusive(self.directory / LOCK_NAME):  # not while someone counts what is there
                        part.rename(path)
            finally:
                # Not there, or another process' by now, after the renaming.
                if _is_at(target, part):
                    part.unlink()

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RemoteError(
                f"{self.directory}: cannot make the cache ({error.strerror}); set data.cache_dir"
            ) from error

    def _make_room(self, target: IO[bytes], count: int) -> None:
        """Evict what is needed for `count` more bytes, and reserve them in `target`."""
        with _exclusive(self.directory / LOCK_NAME):
            entries = []
            for entry in self.directory.iterdir():
                with suppress(FileNotFoundError):
                    if OWN_FILES.fullmatch(entry.name):
                        status = entry.stat()
                        entries.append((status.st_mtime_ns, entry, status.st_size))
            excess = sum(size for _, _, size in entries) + count - self.max_bytes
            for _, entry, size in sorted(entries):
                if excess <= 0:
                    break
                excess -= size if size and _evict(entry) else 0
            if excess > 0:
                raise RemoteError(
                    f"{self.directory}: data.cache_bytes {self.max_bytes} cannot hold {count} bytes more: what it "
                    "holds is in use; raise it, or lower data.window_shards"
                )
            try:
                os.posix_fallocate(target.fileno(), 0, count)
            except OSError as error:
                raise RemoteError(
                    f"{self.directory}: no room for {count} bytes more ({error.strerror}); "
                    "lower data.cache_bytes or set data.cache_dir"
                ) from error


class WindowFetcher:
    """Brings whole windows into the cache: the one that is asked for now, the one after it in the background."""

    def __init__(self, files_of_shard: Callable[[int], Sequence[RemoteFile]], cache: Cache) -> None:
        """Take the files that make up a shard, by its number."""
        self._files_of_shard, self._cache = files_of_shard, cache
        self._lock = threading.Lock()
        self._wanted: deque[RemoteFile] = deque()
        self._is_running = False

    def bring(self, order: RowOrder, epoch: int, window: int) -> None:
        """Return when every file of the window is in the cache; the next window follows in the background.

        Raises:
            RemoteError: a file cannot be fetched, or the cache is too small for the windows that a run holds.
        """
        files = self._files(order, epoch, window)
        needed = WINDOWS_HELD * sum(file.max_bytes for file in files)
        if needed > self._cache.max_bytes:
            raise RemoteError(
                f"data.cache_bytes {self._cache.max_bytes} is too small: {WINDOWS_HELD} windows of "
                f"data.window_shards {len(order.shards_of_window(epoch, window))} need {needed}"
            )
        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            list(pool.map(self._cache.fetch, files))
        upcoming = self._files(order, epoch, window + 1) or self._files(order, epoch + 1, 0)
        with self._lock:
            self._wanted = deque(upcoming)
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="fetch", daemon=True).start()

    def _files(self, order: RowOrder, epoch: int, window: int) -> list[RemoteFile]:
        return [file for shard in order.shards_of_window(epoch, window) for file in self._files_of_shard(int(shard))]

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._is_running = False
                    return
                file = self._wanted.popleft()
            try:
                self._cache.fetch(file)
            except Exception as error:  # whoever needs the file tries again and reports
                logger.warning("prefetch: %s", error)


def _touch(path: Path) -> bool:
    """Mark a complete file as just used; False if it is not there."""
    with suppress(PermissionError):  # another user's file: it just seems older than it is
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
    return True


def _open_shared(path: Path) -> BufferedReader | None:
    """Open a complete file under a shared lock and mark it as just used; None if it is not there."""
    while True:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_at(file, path):
            _touch(path)
            return file
        file.close()


@contextmanager
def _exclusive(path: Path) -> Iterator[BufferedRandom]:
    """Create or open a file for writing, locked against everyone else; waits for the lock."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock before may have renamed or removed the file.
            if _is_at(file, path):
                yield file
                return


def _evict(path: Path) -> bool:
    """Remove a file if no one uses it."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(file, path):
                return False
            path.unlink()
            return True
    except OSError:  # in use, gone, or another user's
        return False


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

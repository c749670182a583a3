"""Files at URLs: `http(s)://` by the standard library; `s3://`, `gs://`, `hf://` and `memory://` through fsspec.

What a server sends is never taken on trust: a download counts only when its SHA-256 is the expected one. Failures
that may pass (refused or cut connections, stalls, answers 429 and 5xx, wrong content) are tried again a few times
with growing delays; the others (404, 403, a missing driver) end in an error at once.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TypeVar

from megatron_md.errors import UserError
from megatron_md.messages import HIDDEN, redacted

T = TypeVar("T")
Read = Callable[[int], bytes]

HTTP = ("http", "https")
PROTOCOLS = (*HTTP, "s3", "gs", "hf", "memory")
ATTEMPTS = 5
FIRST_DELAY = 0.5  # seconds before the second attempt; doubled for each further one
TIMEOUT = 30.0  # seconds without a byte
SLOWEST = 64 * 1024  # bytes per second, over a whole download: a server that drips is a server that stalls
CHUNK_BYTES = 1 << 20
PASSING_STATUS = {408, 425, 429}  # besides 5xx


class RemoteError(UserError):
    """A remote file cannot be had as it should be; the message names its URL, without the secrets in it."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class _WrongContentError(OSError):
    """What arrived is not what was expected; the next attempt may do better."""


@dataclass(frozen=True)
class RemoteFile:
    """A file whose content is known by its hash.

    Attributes:
        url: where it lies.
        max_bytes: more than this is refused.
        sha256: of its content.
    """

    url: str
    max_bytes: int
    sha256: str


def is_url(path: object) -> bool:
    """Does this name a remote file, as opposed to a path?"""
    return "://" in str(path)


def check_url(url: str) -> str:
    """The URL itself, if its kind is allowed.

    Raises:
        RemoteError: unknown protocol, an fsspec chain (`::`), a query or fragment, or a record without its secrets.
    """
    if HIDDEN in url:
        raise RemoteError(f"{url}: a record, from which the secrets were left out; give the URL itself")
    protocol = url.partition("://")[0]
    if protocol not in PROTOCOLS:
        raise RemoteError(f"{url}: protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}; or give a plain path")
    if "::" in url:
        raise RemoteError(f"{url}: chained URLs (`::`) are not allowed; name the file where it lies")
    if protocol in HTTP and ("?" in url or "#" in url):
        raise RemoteError(f"{url}: must not hold a query or fragment: the shards' URLs are made from it")
    return url


def beneath(folder: str, name: str) -> str:
    """URL of a file given by its relative name, which is taken literally."""
    if "::" in name or "://" in name:
        raise RemoteError(f"{folder}: file name {name!r} must be relative and beneath the manifest")
    return f"{folder}/{urllib.parse.quote(name) if folder.partition('://')[0] in HTTP else name}"


def download(file: RemoteFile, target: IO[bytes]) -> None:
    """Write a remote file over the content of `target`, which must be seekable.

    Raises:
        RemoteError: it cannot be fetched, or not with the expected content.
    """

    def attempt() -> None:
        target.seek(0)
        digest = hashlib.sha256()
        for chunk in _chunks(file.url, file.max_bytes):
            digest.update(chunk)
            target.write(chunk)
        received = target.tell()
        target.truncate()
        target.flush()
        if digest.hexdigest() != file.sha256:
            raise _WrongContentError(f"its content ({received} bytes) does not match the manifest's sha256")

    _with_retries(file.url, attempt)


def read(url: str, max_bytes: int) -> bytes:
    """Content of a small remote file whose hash is not known beforehand.

    Raises:
        RemoteError: it cannot be fetched, or is larger than `max_bytes`.
    """
    return _with_retries(check_url(url), lambda: b"".join(_chunks(url, max_bytes)))


def _with_retries(url: str, attempt: Callable[[], T]) -> T:
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except RemoteError:
            raise
        except Exception as error:  # a driver may raise anything
            if number == ATTEMPTS or not _may_pass(error):
                tried = f" (attempt {number} of {ATTEMPTS})" if number > 1 else ""
                reason = " ".join(str(error).split()) or type(error).__name__
                raise RemoteError(f"{url}: cannot be fetched: {reason}{tried}") from error
        time.sleep(FIRST_DELAY * 2 ** (number - 1))
    raise AssertionError("the last attempt returns or raises")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in PASSING_STATUS
    return not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)


def _chunks(url: str, max_bytes: int) -> Iterator[bytes]:
    start, received = time.monotonic(), 0
    with (_open_http if url.partition("://")[0] in HTTP else _open_fsspec)(url) as (read_some, expected):
        while chunk := read_some(CHUNK_BYTES):
            received += len(chunk)
            if received > max_bytes:
                raise _WrongContentError(f"it is larger than {max_bytes} bytes")
            if time.monotonic() - start > TIMEOUT + received / SLOWEST:
                raise TimeoutError(f"it came at less than {SLOWEST} bytes per second")
            yield chunk
    if expected is not None and received != expected:
        raise _WrongContentError(f"the connection ended after {received} of {expected} bytes")


@contextmanager
def _open_http(url: str) -> Iterator[tuple[Read, int | None]]:
    scheme, host, *rest = urllib.parse.urlsplit(url)
    user, _, host = host.rpartition("@")
    url = urllib.parse.urlunsplit((scheme, host, *rest))
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "megatron-md"})
    if user:
        word = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
        request.add_unredirected_header("Authorization", f"Basic {word}")
    with _http_opener().open(request, timeout=TIMEOUT) as response:
        assert isinstance(response, http.client.HTTPResponse)
        length = response.headers.get("Content-Length")
        # read1 returns what has arrived, so that a slow sender is noticed.
        yield response.read1, int(length) if length is not None and length.isdigit() else None


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Never from https to anything else, and with user and password only within one server."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """The request that follows.

        Raises:
            RemoteError: it would leave https.
        """
        there, here = urllib.parse.urlsplit(newurl), urllib.parse.urlsplit(req.full_url)
        if here.scheme == "https" and there.scheme != "https":
            raise RemoteError(
                f"{req.full_url}: it redirects to {newurl}, which is not https; give that URL if you mean it"
            )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        word = req.get_header("Authorization")
        if request is not None and word and (there.scheme, there.netloc) == (here.scheme, here.netloc):
            request.add_unredirected_header("Authorization", word)
        return request


def _http_opener() -> urllib.request.OpenerDirector:
    """The default opener without its file, ftp and data handlers, which a redirection could reach."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        _Redirections,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


@contextmanager
def _open_fsspec(url: str) -> Iterator[tuple[Read, int | None]]:
    protocol, _, path = url.partition("://")
    try:
        import fsspec

        filesystem = fsspec.filesystem(protocol)
    except ImportError as error:
        raise RemoteError(
            f"{url}: {protocol}:// needs a driver ({error}): pip install 'megatron-md[remote]'"
        ) from error
    with filesystem.open(path, "rb") as file:
        yield file.read, None

"""Remote files: what servers may do wrong ends in the right bytes or in one clear error, never in other bytes."""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from megatron_md.cli import main
from megatron_md.data import remote
from megatron_md.data.remote import RemoteError, RemoteFile, beneath, check_url, download
from megatron_md.data.shards import Manifest, load_manifest
from tests.data.file_server import FileServer, file_server
from tests.data.small_corpus import WriteCorpus, random_documents

SHARD = "shard-000000.tar"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)


@pytest.fixture
def manifest(write_tokens: WriteCorpus) -> Manifest:
    return write_tokens(random_documents(200), block_bytes=2000)


@pytest.fixture
def server(manifest: Manifest) -> Iterator[FileServer]:
    with file_server(manifest.directory) as running:
        yield running


def shard_file(manifest: Manifest, server: FileServer) -> RemoteFile:
    shard = manifest.shards[0]
    return RemoteFile(f"{server.url}/{shard.name}", shard.bytes, shard.sha256)


def content(file: RemoteFile) -> bytes:
    target = io.BytesIO(b"\xff" * (2 * file.max_bytes))  # longer than the file: nothing of it may stay
    download(file, target)
    return target.getvalue()


def member_boundary(shard: Path) -> int:
    with tarfile.open(shard) as tar:
        return tar.getmembers()[2].offset


@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["503", "500", "429"],
        ["cut:BOUNDARY", "cut:BOUNDARY", "cut:100", "cut:0"],
        ["short:BOUNDARY", "short:0"],
        ["long:512", "long:1"],
        ["other", "stall:2000", "503", "cut:700"],
    ],
    ids=lambda faults: " ".join(faults) or "none",
)
def test_passing_faults_end_in_the_right_bytes(
    manifest: Manifest, server: FileServer, faults: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.3)
    path = manifest.directory / SHARD
    boundary = str(member_boundary(path))
    server.faults[SHARD].extend(fault.replace("BOUNDARY", boundary) for fault in faults)
    assert content(shard_file(manifest, server)) == path.read_bytes()
    assert not server.faults[SHARD], "every fault was met"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", "HTTP Error 503"),
        ("cut:BOUNDARY", r"the connection ended after \d+ of \d+ bytes"),
        ("short:BOUNDARY", r"its content \(\d+ bytes\) does not match the manifest's sha256"),
        ("long:3", r"the connection ended after"),
        ("other", "does not match the manifest's sha256"),
        ("stall:100", "timed out"),
    ],
)
def test_lasting_faults_end_in_one_clear_error_after_bounded_attempts(
    manifest: Manifest, server: FileServer, fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    boundary = str(member_boundary(manifest.directory / SHARD))
    server.faults[SHARD].extend([fault.replace("BOUNDARY", boundary)] * 100)
    with pytest.raises(RemoteError, match=message) as error:
        content(shard_file(manifest, server))
    assert server.requests[SHARD] == remote.ATTEMPTS
    assert f"{server.url}/{SHARD}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("status", ["404", "403", "401"])
def test_a_refusal_is_final(manifest: Manifest, server: FileServer, status: str) -> None:
    server.faults[SHARD].extend([status] * 2)
    with pytest.raises(RemoteError, match=status):
        content(shard_file(manifest, server))
    assert server.requests[SHARD] == 1


def test_a_file_larger_than_the_manifest_says_is_refused(manifest: Manifest, server: FileServer) -> None:
    file = shard_file(manifest, server)
    with pytest.raises(RemoteError, match="larger than 1000 bytes"):
        content(RemoteFile(file.url, 1000, file.sha256))


def test_a_dripping_server_is_given_up(manifest: Manifest, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.0)
    monkeypatch.setattr(remote, "SLOWEST", 1 << 40)
    monkeypatch.setattr(remote, "_open_http", remote._open_fsspec)  # without the socket's own timeout
    fsspec.filesystem("memory").pipe("/drip/file", b"abc")
    monkeypatch.setattr(remote, "HTTP", ("memory",))
    with pytest.raises(RemoteError, match="bytes per second"):
        remote.read("memory://drip/file", 100)


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/file", "data:,x"])
def test_redirections_lead_to_http_only(manifest: Manifest, server: FileServer, target: str) -> None:
    server.faults[SHARD].extend([f"redirect:{target}"] * 10)
    with pytest.raises(RemoteError, match=r"Redirection to url|unknown url type"):
        content(shard_file(manifest, server))


def test_a_redirection_to_http_is_followed(manifest: Manifest, server: FileServer) -> None:
    server.faults["elsewhere.tar"].append(f"redirect:{server.url}/{SHARD}")
    file = shard_file(manifest, server)
    moved = RemoteFile(f"{server.url}/elsewhere.tar", file.max_bytes, file.sha256)
    assert content(moved) == (manifest.directory / SHARD).read_bytes()


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of 127.0.0.1, signed by itself, trusted by this test, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    path, subject = tmp_path / "certificate.pem", ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    key = ["-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, "-keyout", str(path), "-out", f"{path}.public"]
    subprocess.run([openssl, "req", "-x509", *key], check=True, capture_output=True)
    public = Path(f"{path}.public").read_text()
    path.write_text(path.read_text() + public)
    monkeypatch.setenv("SSL_CERT_FILE", f"{path}.public")
    return path


def test_https_is_followed_to_https_only(manifest: Manifest, server: FileServer, certificate: Path) -> None:
    with file_server(manifest.directory, certificate) as safe:
        file = shard_file(manifest, safe)
        safe.faults["moved.tar"].extend([f"redirect:{safe.url}/{SHARD}", f"redirect:{server.url}/{SHARD}?sig=kept"])
        moved = RemoteFile(f"{safe.url}/moved.tar", file.max_bytes, file.sha256)
        assert content(moved) == content(file) == (manifest.directory / SHARD).read_bytes()
        with pytest.raises(RemoteError, match=r"moved\.tar: it redirects to http://\S+, which is not https") as error:
            content(moved)
    assert not server.requests and "kept" not in str(error.value)


def test_a_manifest_is_not_read_over_http_where_https_was_asked_for(
    manifest: Manifest, server: FileServer, certificate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with file_server(manifest.directory, certificate) as safe:
        safe.faults["manifest.json"].append(f"redirect:{server.url}/manifest.json")
        assert main(["data", "show", safe.url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megatron-md: {safe.url}/manifest.json: it redirects to http://")
    assert not server.requests


def test_user_and_password_are_sent_to_their_server_only(manifest: Manifest, server: FileServer) -> None:
    file = shard_file(manifest, server)
    url = server.url.replace("://", "://user:p%40ss@")
    expected = "Basic " + base64.b64encode(b"user:p@ss").decode()
    server.faults["here.tar"].append(f"redirect:{server.url}/{SHARD}")
    assert content(RemoteFile(f"{url}/here.tar", file.max_bytes, file.sha256))
    assert server.authorization == {"here.tar": expected, SHARD: expected}
    with file_server(manifest.directory) as other:
        server.faults["there.tar"].append(f"redirect:{other.url}/{SHARD}")
        assert content(RemoteFile(f"{url}/there.tar", file.max_bytes, file.sha256))
        assert server.authorization["there.tar"] == expected and other.authorization == {SHARD: None}


@pytest.mark.parametrize(
    "fault", ["404", "redirect:ftp://other/file?sig=hidden", "redirect:http://a:hidden@127.0.0.1:1/"]
)
def test_no_error_tells_a_secret(
    manifest: Manifest, server: FileServer, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults["manifest.json"].extend([fault] * remote.ATTEMPTS)
    url = server.url.replace("://", "://user:hidden@")
    with pytest.raises(RemoteError) as error:
        load_manifest(url)
    assert "hidden" not in str(error.value) and "https://***@" in str(error.value).replace("http:", "https:")
    assert main(["data", "show", f"{url}?sig=hidden"]) == 2
    assert "hidden" not in capsys.readouterr().err


def test_a_record_of_a_url_is_no_url() -> None:
    with pytest.raises(RemoteError, match="the secrets were left out"):
        load_manifest("https://***@host/corpus")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "protocol 'file' is not one of"),
        ("ftp://host/file", "protocol 'ftp'"),
        ("simplecache::s3://bucket/corpus", "protocol 'simplecache::s3'"),
        ("s3://bucket/a::http://host/b", "chained"),
        ("https://host/corpus?token=x", "query"),
        ("https://host/corpus#part", "query or fragment"),
        ("HTTP://host/corpus", "protocol 'HTTP'"),
    ],
)
def test_urls_of_other_kinds_are_refused(url: str, message: str) -> None:
    with pytest.raises(RemoteError, match=message):
        check_url(url)


def test_a_missing_driver_is_named_with_the_extra() -> None:
    with pytest.raises(RemoteError, match=r"pip install 'megatron-md\[remote\]'") as error:
        remote._with_retries("s3://bucket/x", lambda: b"".join(remote._chunks("s3://bucket/x", 10)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("protocol", "module"), [("s3", "s3fs"), ("gs", "gcsfs"), ("hf", "huggingface_hub")])
def test_a_corpus_whose_driver_is_missing_is_one_clear_error(
    protocol: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed, whether it is or not
    url = f"{protocol}://bucket/corpus"
    with pytest.raises(RemoteError, match=r"pip install 'megatron-md\[remote\]'"):
        load_manifest(url)
    assert main(["data", "show", url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megatron-md: {url}/manifest.json: {protocol}:// needs a driver (")


def test_names_are_taken_literally() -> None:
    url = beneath("http://host/corpus", "a %2e%2e?x#y/z.tar")
    assert urllib.parse.urlsplit(url).query == ""
    assert urllib.parse.unquote(urllib.parse.urlsplit(url).path) == "/corpus/a %2e%2e?x#y/z.tar"
    assert beneath("s3://bucket/corpus", "a b/z.tar") == "s3://bucket/corpus/a b/z.tar"
    for name in ("http://evil/x", "a::b"):
        with pytest.raises(RemoteError, match="beneath the manifest"):
            beneath("memory://corpus", name)


def test_fsspec_files_are_read_and_checked() -> None:
    data = bytes(range(256)) * 40
    fsspec.filesystem("memory").pipe("/bucket/file", data)
    file = RemoteFile("memory://bucket/file", len(data), hashlib.sha256(data).hexdigest())
    assert content(file) == data
    fsspec.filesystem("memory").pipe("/bucket/file", data[:-1])
    with pytest.raises(RemoteError, match="does not match the manifest's sha256"):
        content(file)
    with pytest.raises(RemoteError, match="memory://bucket/none: cannot be fetched"):
        content(RemoteFile("memory://bucket/none", 1, file.sha256))

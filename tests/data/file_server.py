"""An HTTP server of files that misbehaves on demand."""

from __future__ import annotations

import ssl
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer(ThreadingHTTPServer):
    """Serves a folder on loopback.

    Attributes:
        faults: per file name, what to do at its next requests instead of serving it well: a status ("503"), "cut:N"
            (N of the promised bytes), "short:N" (N bytes, and says so), "long:N" (promises N bytes more), "stall:N"
            (nothing after N bytes), "redirect:URL", or "other" (wrong bytes of the right number).
        requests: number of requests per file name.
        authorization: the header of that name in the last request per file name.
    """

    daemon_threads = True

    def __init__(self, folder: Path, certificate: Path | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, deque[str]] = defaultdict(deque)
        self.requests: Counter[str] = Counter()
        self.release = threading.Event()
        self.authorization: dict[str, str | None] = {}
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    wbufsize = 1 << 16  # headers and body in one packet

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.requests[name] += 1
        self.server.authorization[name] = self.headers.get("Authorization")
        faults = self.server.faults[name]
        kind, _, value = (faults.popleft() if faults else "none").partition(":")
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", value)
            self.end_headers()
            return
        if kind.isdigit() or not (self.server.folder / name).is_file():
            self.send_error(int(kind) if kind.isdigit() else 404)
            return
        data = (self.server.folder / name).read_bytes()
        length = len(data)
        if kind == "other":
            data = bytes(byte ^ 1 for byte in data)
        if kind in ("cut", "short", "stall"):
            data = data[: int(value)]
        self.send_response(200)
        self.send_header(
            "Content-Length", str({"short": len(data), "long": length + int(value or 0)}.get(kind, length))
        )
        self.end_headers()
        self.wfile.write(data)
        if kind == "stall":
            self.wfile.flush()
            self.server.release.wait(60)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def file_server(folder: Path, certificate: Path | None = None) -> Iterator[FileServer]:
    """A running server, with https where there is a certificate (and its key, in one file); it ends with the block."""
    server = FileServer(folder, certificate)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()

"""What a headless Chromium makes of the pages of a site, without any package that drives it.

A page that is served beside them shows one after the other in a frame, measures, and sends what it found to its server.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
HARNESS = """\
<!doctype html><meta charset="utf-8"><body><script>
const light = (color) => { const [r, g, b] = color.match(/[\\d.]+/g).map(Number); return 0.3 * r + 0.6 * g + 0.1 * b }
const shown = (frame, url) => new Promise((done) => { frame.onload = done; frame.src = url })
async function measure() {
  const found = {}, frame = document.createElement("iframe")
  frame.style = "width: WIDTHpx; height: 800px; border: 0"
  document.body.append(frame)
  for (const url of PAGES) {
    await shown(frame, url)
    const page = frame.contentDocument, body = page.body, style = (part) => frame.contentWindow.getComputedStyle(part)
    const figures = { width: page.documentElement.scrollWidth, wide: [], contrast: {} }
    for (const part of page.querySelectorAll("main *"))
      if (part.getBoundingClientRect().right > WIDTH + 1 && !part.closest("[class*=scrollwrap], pre, .md-sidebar, svg"))
        figures.wide.push(part.tagName + " " + part.textContent.slice(0, 60))
    for (const scheme of ["default", "slate"]) {
      body.setAttribute("data-md-color-scheme", scheme)
      const text = page.querySelector("article")
      figures.contrast[scheme] = light(style(text).color) - light(style(body).backgroundColor)
    }
    figures.broken = [...page.images].filter((image) => image.complete && !image.naturalWidth).map((image) => image.src)
    found[url] = figures
  }
  await fetch("/found", { method: "POST", body: JSON.stringify(found) })
}
measure()
</script></body>
"""


def browser() -> str | None:
    """The command of a Chromium, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and takes what the harness found."""

    found: Queue[dict[str, dict[str, Any]]]

    def do_POST(self) -> None:
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def opened(url: str, profile: Path) -> Iterator[None]:
    """A browser at an address."""
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    words += ["--remote-debugging-port=0", url]  # a port of its own keeps it open
    process = subprocess.Popen(
        [str(browser()), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measure(
    site: Path, pages: list[str], width: int, profile: Path, timeout: float = 240.0
) -> dict[str, dict[str, Any]]:
    """How wide each page is in a window of so many pixels, what sticks out, and the contrast of both colour schemes."""
    harness = HARNESS.replace("PAGES", json.dumps(pages)).replace("WIDTH", str(width))
    (site / "harness.html").write_text(harness)
    found: Queue[dict[str, dict[str, Any]]] = Queue()
    handler = type("Handler", (_Handler,), {"found": found})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with opened(f"http://127.0.0.1:{server.server_port}/harness.html", profile):
            return found.get(timeout=timeout)
    finally:
        server.shutdown()
        server.server_close()

"""Chromium without a window: what a page of a folder does in it, asked by a script beside the page."""

import functools
import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
)
PAGE = """<!doctype html><meta charset="utf-8"><body><script>
const open = (page, width) => new Promise(done => {
    document.querySelectorAll("iframe").forEach(frame => frame.remove());
    const frame = document.createElement("iframe");
    frame.style = `width:${width}px;height:800px;border:0`;
    frame.onload = () => setTimeout(() => done(frame.contentWindow), 50);
    frame.src = page;
    document.body.append(frame);
});
(async () => { SCRIPT })().catch(error => ({error: String(error)})).then(found => {
    document.body.innerHTML = "<pre id=found></pre>";
    document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
"""


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder on this machine alone, and yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def asked(folder: Path, script: str, profile: Path, timeout: float = 300) -> Any:
    """Returns what an asynchronous function found, run on an empty page beside the pages of the folder.

    Args:
        folder: The pages; a page with the script is put beside them, and taken away.
        script: Body of an asynchronous function that returns what JSON can hold; `open(page, width)` gives it the
            window of a page in a frame of that width.
        profile: An empty folder for the browser.
        timeout: Seconds that the browser may take.
    """
    page = folder / "_asked.html"
    page.write_text(PAGE.replace("SCRIPT", script), encoding="utf-8")
    assert CHROMIUM is not None
    try:
        with served(folder) as address:
            command = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", "--window-size=1400,1000", "--dump-dom"]
            command += [f"--virtual-time-budget={int(timeout * 1000)}", f"{address}/{page.name}"]
            dom = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout
    finally:
        page.unlink()
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))

"""report.page: in a browser the page fits phone and desk, light and dark, unfolds in print, and asks for nothing."""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pages import lawful, recorded

from smoothdiag import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome, as `chromium` or `google-chrome` on PATH"),
]

QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
LONG = "model.layers.11.self_attention.query_key_value." * 4

MEASURE = """<script>onload = () => parent.postMessage([
  document.documentElement.scrollWidth,
  getComputedStyle(document.body).backgroundColor,
  [...document.querySelectorAll("figure svg")].filter(one => one.getBoundingClientRect().height < 50).length
], "*")</script>"""
FRAME = """<!DOCTYPE html><body><script>onmessage = e => document.body.dataset.found = JSON.stringify(e.data)</script>
<iframe src="{name}" style="width: {width}px; height: 2000px; border: 0"></iframe></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A page with every kind of section, long names, and two runs."""
    folder = tmp_path_factory.mktemp("pages")
    source = np.random.default_rng(0)
    groups = [lawful(90, group=name, lr=np.linspace(0.1, 0.05, 90)) for name in ("all", LONG, "head")]
    clip = lawful(20, estimator="local_clip", longest_step=0.3, threshold=3.0, peak_lr=0.1, clip_fraction=0.2)
    rows = pd.concat([*groups, clip.assign(status=["ok"] * 19 + ["failed"])])
    noisy = lawful(60, smoothness=source.random(60))
    traces = {"a long name of a run " * 5: recorded(rows, **{LONG: LONG}), "noisy": recorded(noisy)}
    return write_report(traces, folder / "page.html", num_boot=20)


def browse(*arguments: str) -> str:
    with tempfile.TemporaryDirectory() as profile:
        command = [str(BROWSER), *QUIET, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_its_window_in_light_and_dark(page, width, dark) -> None:
    text = page.read_text(encoding="utf-8")
    loose = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace(
        "</body>", f"{MEASURE}</body>"
    )
    copy = page.with_name(f"loose-{width}-{dark}.html")
    copy.write_text(loose, encoding="utf-8")
    frame = page.with_name(f"frame-{width}-{dark}.html")
    frame.write_text(FRAME.format(name=copy.name, width=width), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    found = browse(scheme, "--virtual-time-budget=5000", "--window-size=1400,2100", "--dump-dom", frame.as_uri())
    wide, paper, flat = json.loads(re.search(r'data-found="([^"]*)"', found)[1].replace("&quot;", '"'))
    assert wide <= width
    assert paper == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    assert flat <= 2  # the figures of the evidence of each run are folded


def test_evidence_is_unfolded_in_print(page) -> None:
    def pages(path: Path) -> int:
        out = path.with_suffix(".pdf")
        browse("--no-pdf-header-footer", f"--print-to-pdf={out}", path.as_uri())
        return len(re.findall(rb"/Type\s*/Page\b(?!s)", out.read_bytes()))

    folded = page.with_name("folded.html")
    text = page.read_text(encoding="utf-8")
    folded.write_text(text.replace("details::details-content", "details::no-such-part"), encoding="utf-8")
    assert pages(page) > pages(folded) > 0


def test_browser_asks_for_nothing_but_the_page(page, tmp_path) -> None:
    def asked(path: Path, log: Path) -> set[str]:
        browse(f"--log-net-log={log}", "--virtual-time-budget=3000", "--dump-dom", path.as_uri())
        return set(re.findall(r'"url":"((?!data:)[^"?]*)', log.read_text(encoding="utf-8", errors="replace")))

    blank = tmp_path / "blank.html"
    blank.write_text("<!DOCTYPE html><title>blank</title>")
    own = asked(blank, tmp_path / "blank.json")  # what the browser asks for by itself
    assert asked(page, tmp_path / "page.json") - own <= {page.as_uri()}

"""docs/conf.py: the site builds without a warning, stays on its own address, fits a phone, and answers questions."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import pages
from chromium import CHROMIUM, asked
from places import REPOSITORY

pytestmark = pytest.mark.slow

missing = [name for name in ("sphinx", "furo", "myst_nb") if importlib.util.find_spec(name) is None]
needs_sphinx = pytest.mark.skipif(bool(missing), reason=f"needs the extra `docs`: {', '.join(missing)} not installed")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed")

QUESTIONS = {
    "NOT_IDENTIFIED": {"faq", "verdicts"},
    "TrainingArguments": {"faq", "howto/max_norm"},
    "my run changed": {"faq"},
    "what does it cost": {"faq", "cost"},
    "work with my optimizer": {"faq", "howto/attach"},
    "how sure": {"faq", "intervals"},
    "saturated": {"statuses", "faq", "glossary"},
    "should I clip": {"faq", "howto/max_norm"},
    "FSDP2": {"howto/attach", "distributed", "faq"},
    "logs": {"logs", "faq"},
}
"""What a stranger types, and the pages that answer it."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(folder)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@needs_sphinx
def test_every_page_is_built(site: Path) -> None:
    assert [page for page in pages() if not (site / page).with_suffix(".html").is_file()] == []
    notebook = (site / "first_look.html").read_text(encoding="utf-8")
    assert "L0L1 with L0 = 1.00 and L1 = 2.00" in notebook
    assert notebook.count('<img alt="_images/') == 2


@needs_sphinx
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"""(?:\bsrc=|<link[^>]*\bhref=|@import\s*|\burl\()["']?(?:https?:)?//[^"')\s]+""")
    found = {
        str(path.relative_to(site)): loaded.findall(path.read_text(encoding="utf-8"))
        for path in site.rglob("*")
        if path.suffix in (".html", ".css")
    }
    assert len(found) > 40
    assert {name: links for name, links in found.items() if links} == {}


@needs_sphinx
@needs_chromium
def test_pages_fit_a_phone_and_ask_nobody_else(site: Path, tmp_path: Path) -> None:
    names = [page.replace(".md", ".html") for page in pages()]
    script = f"""
        const found = [];
        for (const page of {json.dumps(names)}) {{
            const shown = await open(page, 390);
            const root = shown.document.documentElement;
            const from = shown.performance.getEntriesByType("resource").map(entry => entry.name);
            const elsewhere = from.filter(name => !name.startsWith(location.origin));
            found.push([page, root.scrollWidth - root.clientWidth, elsewhere]);
        }}
        return found;
    """
    found = asked(site, script, tmp_path / "profile")
    assert [page for page, *_ in found] == names
    assert [(page, over, left) for page, over, left in found if over > 0 or left] == []


@needs_sphinx
@needs_chromium
def test_the_first_page_found_answers(site: Path, tmp_path: Path) -> None:
    script = f"""
        const found = {{}};
        for (const words of {json.dumps(list(QUESTIONS))}) {{
            const shown = await open("search.html?q=" + encodeURIComponent(words), 1280);
            for (let wait = 0; wait < 100 && !shown.document.querySelector("#search-results li a"); wait++)
                await new Promise(done => setTimeout(done, 100));
            await new Promise(done => setTimeout(done, 500));
            const link = shown.document.querySelector("#search-results li a");
            found[words] = link ? link.getAttribute("href") : "";
        }}
        return found;
    """
    found = asked(site, script, tmp_path / "profile")
    first = {words: re.split(r"\.html", link)[0] for words, link in found.items()}
    assert {words: page for words, page in first.items() if page not in QUESTIONS[words]} == {}

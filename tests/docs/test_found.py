"""docs/results.md, docs/tried.md: every figure stands on the page that its line links, beside a script that exists."""

import re

import pytest
from blocks import DOCS, text_of
from places import REPOSITORY

PAGES = ("results.md", "tried.md")
LINES = [
    (page, " ".join(line.split()))
    for page in PAGES
    for line in re.findall(r"^- .*?(?=^- |^## |\Z)", text_of(page), re.MULTILINE | re.DOTALL)
]
NUMBER = re.compile(r"-?(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d*\.\d+|\d+)%?")
# Counts that pages spell out or that follow by adding up what a table holds.
COUNTED = {"18", "2", "108", "90"}


def numbers_of(text: str) -> set[str]:
    """Returns the numbers of a text, .5 and 0.50 and 50 alike, without percent signs."""
    return {f"{float(found.rstrip('%').replace(',', '').lstrip('-')):g}" for found in NUMBER.findall(text)}


def told(line: str) -> set[str]:
    """Returns the figures of a line, without those of links, of names of code and of other libraries."""
    return numbers_of(re.sub(r"\]\([^)]*\)|`[^`]*`|max_norm = 1\b", " ", line))


@pytest.mark.parametrize(("page", "line"), [pytest.param(*line, id=f"{line[0]}-{n}") for n, line in enumerate(LINES)])
def test_figures_stand_on_the_linked_page(page: str, line: str) -> None:
    sources = [(DOCS / page).parent / link for link in re.findall(r"\]\(([^)#]*\.md)", line)]
    scripts = [name for name in re.findall(r"`([\w/]+\.py)`", line)]
    assert sources, "it links no page"
    assert scripts, "it names no script"
    assert [name for name in scripts if not (REPOSITORY / name).is_file()] == []
    there = set().union(*(numbers_of(source.read_text(encoding="utf-8")) for source in sources))
    assert told(line) - there - COUNTED == set()

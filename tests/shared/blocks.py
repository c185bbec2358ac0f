"""The pages of the site, and the blocks of code on them."""

import re
from pathlib import Path
from typing import NamedTuple

from places import REPOSITORY

DOCS = REPOSITORY / "docs"
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n)?^```(?:python|\{code-cell\}[^\n]*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A block of Python on a page.

    Attributes:
        code: What stands in it.
        reason: Why no test runs it; empty if one has to.
        line: Its first line of code on the page, from 1.
    """

    code: str
    reason: str
    line: int


def pages() -> list[str]:
    """Returns the pages of the site by their paths below docs/, in a fixed order."""
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if "_build" not in path.parts)


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[Block]:
    """Returns the blocks of Python of a page, in their order."""
    text = text_of(page)
    return [
        Block(found["code"], found["reason"] or "", text.count("\n", 0, found.start("code")) + 1)
        for found in BLOCK.finditer(text)
    ]


def run(page: str, names: dict[str, object], blocks: list[Block] | None = None) -> dict[str, object]:
    """Runs the blocks of a page one after the other, each at its own lines, and returns the names they leave."""
    path = Path(DOCS / page)
    for block in blocks_of(page) if blocks is None else blocks:
        if not block.reason:
            # An error then names the page and the line.
            exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), names)
    return names


def anchors_of(page: str) -> set[str]:
    """Returns the anchors of the titles on a page, as the site and GitHub make them."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}

"""docs/design.md: the page tells the layers, the prohibitions and the places as the code has them."""

import re

import pytest
from places import REPOSITORY
from scripts import load

TEST = load(REPOSITORY / "tests" / "house" / "test_layers.py")
PAGE = (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8")
PAGES = ("docs/design.md", "CONTRIBUTING.md", "AGENTS.md")


def test_layers_are_those_of_the_test() -> None:
    block = PAGE.split("## Layers")[1].split("```")[1]
    assert [set(line.split()) for line in block.strip().splitlines()] == [set(names) for names in TEST.LAYERS]


def test_who_may_know_what_is_that_of_the_test() -> None:
    section = PAGE.split("## Who may know what")[1].split("## Where")[0]
    told: dict[str, set[str]] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3:
            for room in re.findall(r"`(\w+)`", cells[0]) if cells[0].startswith("`") else ():
                told[room] = set(cells[1].replace("`", "").split(", "))
    assert told == TEST.FORBIDDEN


@pytest.mark.parametrize("page", PAGES)
def test_every_place_that_is_named_exists(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:smoothdiag|tests|docs|benchmarks|examples)/[\w./]*)`", text)
    named += re.findall(r"`([A-Z]+\.md)`", text)
    assert named
    assert [place for place in named if not (REPOSITORY / place).exists()] == []


def test_every_room_has_a_place_on_the_page() -> None:
    package = REPOSITORY / "smoothdiag"
    rooms = sorted(path.parent.relative_to(package).as_posix() for path in package.glob("*/**/__init__.py"))
    assert {"fits/scans", "measure/scan"} < set(rooms)
    assert [room for room in rooms if f"`smoothdiag/{room}/" not in PAGE] == []


def test_page_for_agents_is_short() -> None:
    assert len((REPOSITORY / "AGENTS.md").read_text(encoding="utf-8").splitlines()) < 30

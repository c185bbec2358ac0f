"""docs/api: every public name stands on a page of the reference, once, and no page names what is not there."""

import importlib
import re
from collections import Counter

import pytest
from blocks import pages, text_of

import smoothdiag as sd

PLACES = re.findall(
    r"^\.\. auto(\w+):: (\S+)$",
    "\n".join(text_of(page) for page in pages() if page.startswith("api/")),
    re.MULTILINE,
)
ROOMS = ("optim", "geometry", "integrations.loggers", "doctor")
"""Rooms whose `__all__` is public."""


def on_pages() -> set[str]:
    return {path.removeprefix("smoothdiag.") for _, path in PLACES}


def test_every_public_name_has_its_place() -> None:
    assert set(sd.__all__) - on_pages() == set()


@pytest.mark.parametrize("room", [pytest.param(r, marks=pytest.mark.thorough if "." in r else ()) for r in ROOMS])
def test_every_name_of_a_public_room_has_its_place(room: str) -> None:
    names = importlib.import_module(f"smoothdiag.{room}").__all__
    placed = {path.rpartition(".")[2] for path in on_pages()}
    assert set(names) - placed - {"Pixels"} == set()  # a name for an array, with no text of its own


def test_every_problem_has_its_place() -> None:
    functions = {
        name
        for name, value in vars(sd.problems).items()
        if getattr(value, "__module__", "") == "smoothdiag.problems" and name[0] != "_"
    }
    assert {f"problems.{name}" for name in functions} - on_pages() == set()


def test_no_name_stands_twice() -> None:
    assert [path for path, times in Counter(path for _, path in PLACES).items() if times > 1] == []


def test_what_a_page_names_is_there() -> None:
    for kind, path in PLACES:
        if ".integrations." not in path:
            room, _, name = path.rpartition(".")
            found = importlib.import_module(path) if kind == "module" else getattr(importlib.import_module(room), name)
            assert isinstance(found, type) == (kind in ("class", "exception")), path

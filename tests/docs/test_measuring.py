"""docs/measuring.md: the page lists every status as the code words it, and names files that exist."""

import re

import pytest
from places import REPOSITORY

from smoothdiag import Status

PAGE = (REPOSITORY / "docs" / "measuring.md").read_text(encoding="utf-8")


def test_the_table_of_statuses_is_that_of_the_code() -> None:
    listed = PAGE.partition("## Statuses")[2].splitlines()
    rows = [f"| `{s.name.lower()}` | {'yes' if s.usable else 'no'} | {s.value} |" for s in Status]
    assert [line for line in listed if line.startswith("| `")] == rows


@pytest.mark.parametrize("name", re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)`|docs/(\w+\.py)", PAGE))
def test_scripts_exist(name) -> None:
    assert (REPOSITORY / (name[0] or f"docs/{name[1]}")).is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\((.*?)\)", PAGE))
def test_links_lead_somewhere(link) -> None:
    assert (REPOSITORY / "docs" / link).is_file()

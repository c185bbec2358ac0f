"""benchmarks/autoclip/several.py: the table on the page is that of the stored runs."""

import json

import pytest
from places import REPOSITORY
from scripts import load

FOLDER = REPOSITORY / "benchmarks" / "autoclip"


def test_the_table_on_the_page_is_that_of_the_stored_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    script = load(FOLDER / "several.py")
    page = (REPOSITORY / "docs" / "autoclip.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- begin: table by several.py -->")[2].partition("<!-- end -->")[0]
    assert shown.strip() == script.table(json.loads((FOLDER / "several.json").read_text())["runs"])

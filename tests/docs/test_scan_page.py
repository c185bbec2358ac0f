"""docs/scan.md: the example runs as it stands, and links and names lead somewhere."""

import re

import pytest
import torch
from places import REPOSITORY

from smoothdiag import Trace
from smoothdiag.measure.scan import MAX_DISTANCE, SPACING, lines, search
from smoothdiag.measure.scan.lines import Targets, names_of
from smoothdiag.measure.scan.scanning import FAR

PAGE = (REPOSITORY / "docs" / "scan.md").read_text(encoding="utf-8")
COLUMNS = (REPOSITORY / "docs" / "traces.md").read_text(encoding="utf-8").partition("## Columns of a scan")[2]


@pytest.mark.thorough
def test_the_example_runs_and_its_columns_are_listed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(example, {})
    assert "VERDICT" in capsys.readouterr().out
    trace = Trace.read("scan.jsonl")
    listed = set(re.findall(r"^\| `(\w+)`", COLUMNS.partition("\n## ")[0], re.MULTILINE))
    assert listed - {"ended"} <= {name for row in trace for name in row}


def test_lines_of_the_table_are_those_of_the_code() -> None:
    table = PAGE.partition("## Lines")[2].partition("Without")[0]
    names = [
        name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(.*?)`", cell)
    ]
    assert len(names) == 12
    names_of(names, Targets({"PARAMETER": 0}, {"NAME": []}, []), [torch.zeros(1)])


def test_lines_by_default_come_in_the_order_of_the_page() -> None:
    targets = Targets({"small": 0, "large": 1}, {"NAME": []}, [])
    names = names_of(None, targets, [torch.zeros(1), torch.zeros(2)])[:11]
    kinds = [re.sub("small|large", "PARAMETER", name) for name in names]
    order = PAGE.partition("Without `directions`")[2].partition("Where a line ends")[0]
    told = ["along the gradient", "`update`", "`toward`", *(f"`{name}`" for name in dict.fromkeys(kinds[5:]))]
    assert kinds[:5] == ["gradient up", "gradient down", "update", "to NAME", "from NAME"]
    assert "large" in names[7]
    assert sorted(told, key=order.index) == told


def test_the_page_quotes_the_defaults_of_the_code() -> None:
    assert lines.NUM_LINES == 14
    assert "fourteen lines at a time" in PAGE
    assert f"by {SPACING}, give or take a quarter" in PAGE
    assert search.TOLERANCE == 0.25
    for quoted in (f"a move of {search.LAST} is", f"than {search.NEAREST} ||x||", f"the distance {FAR} ||x||"):
        assert quoted.replace(" 0.", " .") in PAGE
    assert f"by default {MAX_DISTANCE:g} ||x||" in PAGE


@pytest.mark.parametrize("link", re.findall(r"\]\((.*?)\)", PAGE))
def test_links_lead_somewhere(link) -> None:
    assert (REPOSITORY / "docs" / link).exists()

"""docs/scan.md: the example runs as it stands, and links and names lead somewhere."""

import re

import pytest
from places import REPOSITORY

from smoothdiag import Trace
from smoothdiag.measure.scan.lines import Targets, names_of

PAGE = (REPOSITORY / "docs" / "scan.md").read_text(encoding="utf-8")
COLUMNS = (REPOSITORY / "docs" / "traces.md").read_text(encoding="utf-8").partition("## Columns of a scan")[2]


@pytest.mark.thorough
def test_the_example_runs_and_its_columns_are_listed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(example, {})
    assert "VERDICT" in capsys.readouterr().out
    trace = Trace.read("scan.jsonl")
    listed = set(re.findall(r"^\| `(\w+)`", COLUMNS.partition("## Who")[0], re.MULTILINE))
    assert listed - {"ended"} <= {name for row in trace for name in row}


def test_lines_of_the_table_are_those_of_the_code() -> None:
    table = PAGE.partition("## Lines")[2].partition("Without")[0]
    names = [
        name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(.*?)`", cell)
    ]
    assert len(names) == 10
    names_of(names, Targets({"PARAMETER": 0}, {"NAME": []}, update=[]), start=[])


@pytest.mark.parametrize("link", re.findall(r"\]\((.*?)\)", PAGE))
def test_links_lead_somewhere(link) -> None:
    assert (REPOSITORY / "docs" / link).exists()

"""docs/ecosystem.md: the table names each library of the extra, at the version that constraints.txt pins."""

import importlib.metadata
import re
import tomllib

import pytest
from places import REPOSITORY

PAGE = (REPOSITORY / "docs" / "ecosystem.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", PAGE, re.MULTILINE)


def test_every_library_is_named_and_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.split(r"[\[>]", entry)[0] for entry in project["optional-dependencies"]["ecosystem"]}
    assert {name for name, _ in ROWS} == wanted - {"smoothdiag", "datasets"}
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [f"{name}=={version}" for name, version in ROWS if f"{name}=={version}" not in pins] == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "version"), ROWS)
def test_the_version_of_the_table_is_the_one_that_runs(name: str, version: str) -> None:
    try:
        assert importlib.metadata.version(name) == version
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")

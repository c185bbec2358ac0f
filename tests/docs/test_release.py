"""docs/release.md: the version is one in all places, and the checks of a release refuse what is wrong."""

import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from places import REPOSITORY
from scripts import load

import smoothdiag

CHECK = load(REPOSITORY / ".ci" / "metadata.py")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
METADATA = """Metadata-Version: 2.4
Name: smoothdiag
Version: {version}
License-Expression: Apache-2.0
Description-Content-Type: text/markdown

# smoothdiag
"""


def wheel(
    folder: Path, version: str = "1.0", metadata: str = METADATA, shipped: tuple[str, ...] = CHECK.SHIPPED
) -> str:
    path = folder / f"smoothdiag-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"smoothdiag-{version}.dist-info/METADATA", metadata.format(version=version))
        for name in shipped:
            file.writestr(name, "")
    return str(path)


def sdist(folder: Path, version: str = "1.0") -> str:
    root = folder / f"smoothdiag-{version}"
    for name in CHECK.SHIPPED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "PKG-INFO").write_text(METADATA.format(version=version))
    with tarfile.open(f"{root}.tar.gz", "w:gz") as file:
        file.add(root, root.name)
    return f"{root}.tar.gz"


def test_the_version_is_one() -> None:
    assert PROJECT["version"] == smoothdiag.__version__ == str(CITATION["version"])


def test_the_citation_has_what_the_format_asks_for() -> None:
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)
    assert CITATION["license"] == PROJECT["license"]
    for entry in (CITATION, *CITATION["references"]):
        assert entry["title"]
        assert all({"name"} <= set(a) or {"family-names", "given-names"} <= set(a) for a in entry["authors"])


def test_steps_name_what_exists() -> None:
    text = (REPOSITORY / "docs" / "release.md").read_text(encoding="utf-8")
    targets = re.findall(r"`make (\w+)", text)
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert {"docs", "release"} < set(targets)
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


def test_valid_distributions_of_one_version_pass(tmp_path, capsys) -> None:
    CHECK.main([wheel(tmp_path), sdist(tmp_path)])
    assert "2 files is valid, version 1.0" in capsys.readouterr().out


def test_a_wheel_without_types_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"lacks smoothdiag/py\.typed"):
        CHECK.main([wheel(tmp_path, shipped=CHECK.SHIPPED[1:])])


def test_two_versions_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="one version"):
        CHECK.main([wheel(tmp_path), sdist(tmp_path, "1.1")])


def test_metadata_that_is_not_valid_is_refused(tmp_path) -> None:
    with pytest.raises(ExceptionGroup, match="invalid|unparsed"):
        CHECK.main([wheel(tmp_path, metadata=METADATA.replace("text/markdown", "text/rich"))])

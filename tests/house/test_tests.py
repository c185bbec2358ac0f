"""tests: every test file says in its first line what it is about, and lies in the folder where that belongs."""

import ast
import re
from pathlib import Path

import pytest
from places import REPOSITORY

TESTS = REPOSITORY / "tests"
PACKAGE = REPOSITORY / "smoothdiag"
FORM = re.compile(r"(?P<subjects>[\w./]+(?:, [\w./]+)*): (?P<sentence>\S.*\.)")
"""Subjects are modules of the package without its name, `smoothdiag`, `tests`, or paths in the repository."""


ELSEWHERE = {
    "tests": {"house"},
    "smoothdiag": {".", "house", "docs"},
    "README.md": {"docs"},
    "docs": {"docs", "ecosystem"},
    "benchmarks": {"benchmarks"},
    "examples": {"integrations"},
}
"""Folders for what is no module of the package."""


def folders_of(subject: str) -> set[str]:
    """Returns the folders where tests of the subject may lie; none if there is no such subject."""
    top = subject.split("/")[0]
    if top in ELSEWHERE:
        return ELSEWHERE[top] if (REPOSITORY / subject).exists() else set()
    module = PACKAGE.joinpath(*subject.split("."))
    if module.is_dir():
        return {subject.replace(".", "/")}
    return {str(module.parent.relative_to(PACKAGE))} if module.with_suffix(".py").is_file() else set()


def faults(path: Path, folder: str) -> list[str]:
    """Returns what is wrong with the docstring of a test file in this folder of the tests."""
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    found = FORM.fullmatch(lines[0]) if lines else None
    if not found:
        return ["the docstring should begin with a subject, a colon and one sentence, in one line"]
    subjects = found["subjects"].split(", ")
    unknown = [f"there is no `{subject}`" for subject in subjects if not folders_of(subject)]
    places = folders_of(subjects[0])
    misplaced = [f"tests of `{subjects[0]}` belong in {sorted(places)}"] if places and folder not in places else []
    return unknown + misplaced


def test_every_file_says_what_it_is_about_and_lies_there() -> None:
    paths = {path.relative_to(TESTS): path for path in sorted(TESTS.rglob("test_*.py"))}
    found = {str(name): faults(path, name.parent.as_posix()) for name, path in paths.items()}
    assert len(found) > 90
    assert not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize(
    ("docstring", "folder", "message"),
    [
        ("", "fits", "should begin with a subject"),
        ('"""Fits of runs."""', "fits", "should begin with a subject"),
        ('"""fits: fits of\nruns."""', "fits", "should begin with a subject"),
        ('"""fits.affine, fits.stray: lines."""', "fits", "no `fits.stray`"),
        ('"""docs/stray.md: a page."""', "docs", "no `docs/stray.md`"),
        ('"""fits.affine: lines."""', "plots", "belong in ['fits']"),
        ('"""fits.affine: lines."""', ".", "belong in ['fits']"),
        ('"""vectors: sums."""', "fits", "belong in ['.']"),
        ('"""measure.loss.state: buffers."""', "measure/probe", "belong in ['measure/loss']"),
        ('"""measure.loss: losses."""', "measure", "belong in ['measure/loss']"),
        ('"""benchmarks/autoclip: a benchmark."""', "autoclip", "belong in ['benchmarks']"),
        ('"""smoothdiag: everything."""', "fits", "belong in ['.', 'docs', 'house']"),
    ],
)
def test_planted_fault_is_found(tmp_path: Path, docstring: str, folder: str, message: str) -> None:
    path = tmp_path / "test_planted.py"
    path.write_text(docstring, encoding="utf-8")
    (found,) = faults(path, folder)
    assert message in found

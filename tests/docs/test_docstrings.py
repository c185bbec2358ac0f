"""smoothdiag: every public docstring shows its name in use, in a few lines that run and print what they say.

The lines may use `sd`, `torch` and `nn`, imported as everywhere; they make everything else that they need.
"""

import doctest
import inspect
from types import ModuleType

import matplotlib
import pytest
import torch

import smoothdiag as sd

FEWEST, MOST = 2, 5
"""Lines of code in an example."""


def example_of(name: str) -> doctest.DocTest:
    value = getattr(sd, name)
    text = inspect.cleandoc(value.__doc__)
    names = {"sd": sd, "torch": torch, "nn": torch.nn}
    return doctest.DocTestParser().get_doctest(text, names, f"smoothdiag.{name}", None, None)


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in sd.__all__])
def test_public_docstring_has_an_example_that_runs(name: str, tmp_path, monkeypatch) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    test = example_of(name)
    lines = sum(len(example.source.splitlines()) for example in test.examples)
    assert FEWEST <= lines <= MOST, f"{lines} lines of code"
    assert any(example.want for example in test.examples), "it prints nothing"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found: list[str] = []
    doctest.DocTestRunner(optionflags=flags).run(test, out=found.append)
    assert not found, "".join(found)


def test_modules_among_the_public_names_are_few() -> None:
    assert {name for name in sd.__all__ if isinstance(getattr(sd, name), ModuleType)} == {"doctor", "problems"}

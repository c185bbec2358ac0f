"""Every public docstring shows the name in use, in a few lines that run as they stand and print what they say.

The lines may use `sd`, `torch` and `nn`, imported as everywhere; whatever else they need they make.
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

WITHOUT: frozenset[str] = frozenset(
    {
        "Status",
        "SmoothdiagWarning",
        "Trace",
        "LogReview",
        "read_log",
        "review_log",
        "GroupFits",
        "SmoothnessFit",
        "Verdict",
        "compare_runs",
        "fit_groups",
        "fit_smoothness",
        "AutoClip",
        "ClipRule",
        "StepRate",
        "StepRule",
        "clip_rule",
        "step_rate",
        "Diagonal",
        "Euclidean",
        "Geometry",
        "plot_clipping",
        "plot_constants",
        "plot_fit",
        "plot_groups",
        "plot_sharpness",
        "plot_smoothness",
        "plot_trace",
        "doctor",
        "problems",
    }
)
"""Names that have no example yet."""


def example_of(name: str) -> doctest.DocTest:
    value = getattr(sd, name)
    text = inspect.cleandoc(value.__doc__)
    names = {"sd": sd, "torch": torch, "nn": torch.nn}
    return doctest.DocTestParser().get_doctest(text, names, f"smoothdiag.{name}", None, None)


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in sd.__all__ if n not in WITHOUT])
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

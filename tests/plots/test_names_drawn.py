"""plots.common: names of groups, estimators and runs reach figures as they are, never as a formula or a broken line."""

import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

import smoothdiag as sd
from smoothdiag.plots.common import as_drawn

pytestmark = pytest.mark.thorough

matplotlib.use("Agg")

NAMES = {
    "formula": "$x$",
    "broken formula": r"$\undefined{x}$",
    "one dollar": "price$",
    "escaped dollar": r"a\$b$",
    "underscore": "_hidden_",
    "power": "a^b_c{",
    "zero": "a\0b",
    "line break": "a\nb",
    "terminal escape": "\x1b[31mred",
    "half a character": "\\udc80",  # traces keep its escape
    "format": "{0} %s %(a)d",
    "backslash": "\\frac",
}


def trace_of(name: str) -> sd.Trace:
    trace = sd.Trace()
    for step, norm in enumerate(10 ** np.random.default_rng(0).uniform(-1, 1, 60)):
        for group in ("all", name):
            row = {"step": step, "estimator": name, "group": group, "grad_norm": norm, "smoothness": 1 + norm}
            trace.append(row | {"saturation": 0.1, "loss": 1.0})
    return trace


def fit_of(trace: sd.Trace, name: str) -> sd.SmoothnessFit:
    return sd.fit_smoothness(trace, estimator=name, group=name, num_boot=20)


PLOTS = {
    "plot_smoothness": lambda trace, name: sd.plot_smoothness(trace, estimator=name, group=name),
    "plot_smoothness of a fit": lambda t, name: sd.plot_smoothness(t, fit=fit_of(t, name), group=name),
    "plot_trace": lambda trace, name: sd.plot_trace(trace, estimator=name, group=name),
    "plot_groups": lambda trace, name: sd.plot_groups(trace),
    "plot_groups of fits": lambda t, name: sd.plot_groups(t, fits=sd.fit_groups(t, estimator=name, num_boot=20)),
    "plot_constants": lambda t, name: sd.plot_constants(sd.fit_groups(t, estimator=name, num_boot=20)),
    "plot_constants of runs": lambda t, name: sd.plot_constants({name: fit_of(t, name)}),
}


def cases() -> list[object]:
    """Returns every name in every plot; but for two of the names, all plots but one are slow."""
    return [
        pytest.param(
            plot, kind, id=f"{kind}-{plot}",
            marks=pytest.mark.slow if kind not in ("broken formula", "line break") and i % len(PLOTS) != j else (),
        )
        for i, kind in enumerate(NAMES) for j, plot in enumerate(PLOTS)
    ]  # fmt: skip


@pytest.mark.usefixtures("no_figure_left_open")
@pytest.mark.parametrize(("plot", "kind"), cases())
def test_names_are_drawn_as_they_are(plot, kind) -> None:
    name, trace = NAMES[kind], trace_of(NAMES[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = np.ravel(PLOTS[plot](trace, name))[0].figure
        figure.canvas.draw()
    shown = [text.get_text() for text in figure.findobj(Text)]
    assert any(as_drawn(name) in text for text in shown)


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_is_no_formula_and_one_line(kind) -> None:
    text = Figure().text(0, 0, as_drawn(NAMES[kind]))
    cleaned, is_math = text._preprocess_math(text.get_text())
    assert not is_math
    assert cleaned.isprintable()
    if NAMES[kind].isprintable():
        assert cleaned == NAMES[kind]

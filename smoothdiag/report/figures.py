"""figures: which figures a run has, what they show in words, and what was left out to keep the page small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from smoothdiag.console import counted
from smoothdiag.plots.common import rescales
from smoothdiag.plots.looks import broken
from smoothdiag.report.svg import WIDTH, Drawing, draw, draw_own
from smoothdiag.rows import CLIP_BENEFIT

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Canvas

    from smoothdiag.report.run import Run

_CURVATURE: Final = ("sharpness", "hessian_norm", "curvature_gradient", "curvature_update", "critical_step")


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        place: the section that it belongs to.
        title: what it shows, as a caption.
        reading: how to read it.
        drawing: the figure itself.
    """

    place: str
    title: str
    reading: str
    drawing: Drawing


class Wanted(NamedTuple):
    """A figure that a run may have.

    Attributes:
        place: the section that it belongs to.
        title: what it shows, as a caption.
        reading: how to read it; for some figures that depends on the run.
        is_there: whether a run has it.
        height: its height in inches; None for a figure that makes its own canvas.
        draw: draws it on a canvas, or makes it and returns an axes of it.
    """

    place: str
    title: str
    reading: str | Callable[[Run], str]
    is_there: Callable[[Run], bool]
    height: float | Callable[[Run], float] | None
    draw: Callable[..., Any]


def figures_of(run: Run, prefix: str) -> list[Figure]:
    """Returns the figures of a run; ``prefix`` begins every name inside them."""
    there = [wanted for wanted in _FIGURES if wanted.is_there(run)]
    return [_drawn(wanted, run, f"{prefix}f{number}") for number, wanted in enumerate(there)]


def _drawn(wanted: Wanted, run: Run, name: str) -> Figure:
    height, reading = wanted.height, wanted.reading
    if height is None:
        drawing = draw_own(name, lambda: _canvas(wanted.draw(run)))
    else:
        drawing = draw(name, lambda canvas: wanted.draw(run, canvas), height(run) if callable(height) else height)
    return Figure(wanted.place, wanted.title, reading(run) if callable(reading) else reading, drawing)


def thinned(run: Run, figures: list[Figure]) -> list[str]:
    """Returns what the figures of a large trace do not show as shapes, in sentences."""
    titles = [figure.title for figure in figures if figure.drawing.is_thinned]
    if not titles:
        return []
    return [
        f"{counted(len(run.frame), 'row')} make many marks. So the marks of these figures are pixels, and do not stay "
        f"sharp when you zoom in: {'; '.join(titles)}. No row is left out of the figures, of the tables or of the fit."
    ]


def height_of_constants(names: Iterable[str]) -> float:
    """Returns the height of a figure of the constants of some fits, in inches."""
    lines = [1 + broken(name).count("\n") for name in names]
    return max(0.9 * WIDTH, 2.2 + 0.25 * len(lines) * (1 + max(lines, default=1)))


def _canvas(ax: Any) -> Canvas:
    canvas: Canvas = ax.figure
    return canvas


def _base(estimator: str) -> str:
    return estimator.removesuffix("_preconditioned")


def _rates(frame: pd.DataFrame) -> tuple[Any, Any] | None:
    """Returns steps and learning rates; None if the rate is unknown or stays the same."""
    rows = frame[frame["lr"].notna()].drop_duplicates("step").sort_values("step")
    rate = rows["lr"].to_numpy(dtype=np.float64)
    return (rows["step"].to_numpy(), rate) if rate.size and np.ptp(rate) > 0 else None


def _draw_rates(run: Run, canvas: Canvas) -> None:
    import seaborn as sns

    found = _rates(run.frame)
    assert found is not None
    ax = canvas.subplots()
    ax.step(*found, where="post", color=sns.color_palette("colorblind")[0], linewidth=1.2)
    ax.set(xlabel="step", ylabel="learning rate\n[x$^2$/f]", ylim=(0, None))
    sns.despine(ax=ax)


def _estimator(run: Run) -> str | None:
    return None if run.fit is None else run.fit.estimator


def _group(run: Run) -> str:
    return "all" if run.fit is None else run.fit.group


def _smoothness(run: Run, canvas: Canvas) -> None:
    from smoothdiag import plots

    plots.plot_smoothness(run.frame, fit=run.fit, estimator=_estimator(run), group=_group(run), ax=canvas.subplots())


def _over_steps(run: Run, canvas: Canvas) -> None:
    from smoothdiag import plots

    panels = canvas.subplots(3, sharex=True)
    plots.plot_trace(run.frame, estimator=_estimator(run), group=_group(run), ax=panels)


def _of_over_steps(run: Run) -> str:
    if rescales(run.frame):
        return "Hollow marks are rows that fits may not use."
    return "The dashed line is 2 over the learning rate, where the smoothness of plain gradient descent settles."


def _sharpness(run: Run, canvas: Canvas) -> None:
    from smoothdiag import plots

    plots.plot_sharpness(run.frame, group=_group(run), ax=canvas.subplots())


def _constants(run: Run, canvas: Canvas) -> None:
    from smoothdiag import plots

    assert run.groups is not None
    plots.plot_constants(run.groups, axes=canvas.subplots(2, 1))


def _groups(run: Run) -> Any:
    from smoothdiag import plots

    return plots.plot_groups(run.frame, fits=run.groups)[0]


def _clipping(run: Run, canvas: Canvas) -> None:
    from smoothdiag import plots

    plots.plot_clipping(run.frame, history=run.history, ax=canvas.subplots())


def _of_clipping(run: Run) -> str:
    if run.clipped is not None and not run.clipped.acts:
        return "AutoClip was in shadow mode. It would have shortened the steps that lie above the black line."
    return "AutoClip shortened the steps that would have been longer than the black line."


def _spikes(run: Run, canvas: Canvas) -> None:
    from smoothdiag import plots

    plots.plot_spikes(run.frame, signal=spiked_signal(run), ax=canvas.subplots())


def spiked_signal(run: Run) -> str:
    """Returns the signal that the figure of spikes draws: the loss, if it spiked, because most people watch it."""
    assert run.spikes is not None
    numbers = Counter(run.spikes["signal"].astype(str))
    return min(numbers, key=lambda name: (name != "loss", -numbers[name], name))


def _of_spikes(run: Run) -> str:
    assert run.spikes is not None
    rest = run.spikes["step"].nunique() - int((run.spikes["signal"] == spiked_signal(run)).sum())
    said = "A thin line leads from what was usual to each spike. A hollow mark is a step that was skipped or clipped."
    return said + (f" {counted(rest, 'further step')} with spikes of other signals: see the table." if rest else "")


def _benefit(run: Run, canvas: Canvas) -> None:
    from smoothdiag import plots

    plots.plot_benefit(run.frame, ax=canvas.subplots())


def _evidence(run: Run, canvas: Canvas) -> None:
    from smoothdiag import plots

    assert run.fit is not None
    plots.plot_fit(run.fit, run.frame, axes=canvas.subplots(4, 1))


_FIGURES: Final = (
    Wanted(
        "measured",
        "Smoothness against the gradient norm",
        "Each point is a measurement. If the law holds, the points rise along the black line. Points that crowd along "
        "an artefact line tell about the step, and not about the loss.",
        lambda run: True,
        1.05 * WIDTH,
        _smoothness,
    ),
    Wanted(
        "measured",
        "Loss, gradient norm and smoothness over the steps",
        _of_over_steps,
        lambda run: not run.is_scan,
        1.25 * WIDTH,
        _over_steps,
    ),
    Wanted(
        "measured",
        "Learning rate over the steps",
        "A threshold is for the largest rate.",
        lambda run: not run.is_scan and _rates(run.frame) is not None,
        0.45 * WIDTH,
        _draw_rates,
    ),
    Wanted(
        "measured",
        "Curvature over the steps",
        "Where the curvature stays above the limit, the optimizer is unstable.",
        lambda run: not run.is_scan and bool({_base(name) for name in run.frame["estimator"]} & set(_CURVATURE)),
        0.9 * WIDTH,
        _sharpness,
    ),
    Wanted(
        "groups",
        "L0 and L1 of every module, with their intervals",
        "Filled marks may be used. The constants of hollow ones are not established.",
        lambda run: run.groups is not None,
        lambda run: height_of_constants(run.groups or ()),
        _constants,
    ),
    Wanted(
        "groups",
        "Smoothness against the gradient norm, module by module",
        "All panels have the same axes, so that the modules can be compared.",
        lambda run: run.groups is not None,
        None,
        _groups,
    ),
    Wanted(
        "clipping",
        "Measured lengths and the longest step of AutoClip",
        _of_clipping,
        lambda run: run.history is not None,
        0.9 * WIDTH,
        _clipping,
    ),
    Wanted(
        "clipping",
        "Was clipping worth it?",
        "Above the line at zero, clipping would have lowered the loss after this one step.",
        lambda run: bool((run.frame["estimator"] == CLIP_BENEFIT).any()),
        0.7 * WIDTH,
        _benefit,
    ),
    Wanted(
        "spikes",
        "Spikes over the steps, and their causes",
        _of_spikes,
        lambda run: run.spikes is not None,
        0.9 * WIDTH,
        _spikes,
    ),
    Wanted(
        "evidence",
        "Evidence for and against the line",
        "Residuals, lines at other quantiles, pairs of L0 and L1 that cover every row, and rival models.",
        lambda run: run.fit is not None,
        3.6 * WIDTH,
        _evidence,
    ),
)

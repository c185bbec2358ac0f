"""figures: which figures a run has, what they show in words, and what was left out to keep the page small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from smoothdiag.console import counted
from smoothdiag.report.svg import WIDTH, Drawing, draw, draw_own

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Canvas

    from smoothdiag.fits import SmoothnessFit
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


def figures_of(run: Run, prefix: str) -> list[Figure]:
    """Returns the figures of a run; ``prefix`` begins every name inside them."""
    return [
        Figure(place, title, reading, make(f"{prefix}f{number}"))
        for number, (place, title, reading, make) in enumerate(_wanted(run))
    ]


Wanted = tuple[str, str, str, Callable[[str], Drawing]]


def _wanted(run: Run) -> Iterator[Wanted]:
    from smoothdiag import plots

    frame, fit = run.frame, run.fit
    estimator, group = (None, "all") if fit is None else (fit.estimator, fit.group)
    yield (
        "measured",
        "Smoothness against the gradient norm",
        "Each point is a measurement. If the law holds, the points rise along the black line. Points that crowd along "
        "an artefact line tell about the step, and not about the loss.",
        lambda name: draw(
            name,
            lambda figure: plots.plot_smoothness(
                frame, fit=fit, estimator=estimator, group=group, ax=figure.subplots()
            ),
            1.05 * WIDTH,
        ),
    )
    if not run.is_scan:
        yield (
            "measured",
            "Loss, gradient norm and smoothness over the steps",
            "The dashed line is 2 over the learning rate, where the smoothness of plain gradient descent settles.",
            lambda name: draw(
                name,
                lambda figure: plots.plot_trace(
                    frame, estimator=estimator, group=group, ax=figure.subplots(3, sharex=True)
                ),
                1.25 * WIDTH,
            ),
        )
        if (rates := _rates(frame)) is not None:
            yield (
                "measured",
                "Learning rate over the steps",
                "A threshold is for the largest rate.",
                lambda name: draw(name, lambda figure: _draw_rates(figure, *rates), 0.45 * WIDTH),
            )
        if {_base(name) for name in frame["estimator"].unique()} & set(_CURVATURE):
            yield (
                "measured",
                "Curvature over the steps",
                "Where the curvature stays above the limit, the optimizer is unstable.",
                lambda name: draw(
                    name, lambda figure: plots.plot_sharpness(frame, group=group, ax=figure.subplots()), 0.9 * WIDTH
                ),
            )
    if (groups := run.groups) is not None:
        yield (
            "groups",
            "L0 and L1 of every module, with their intervals",
            "Filled marks may be used. The constants of hollow ones are not established.",
            lambda name: draw(
                name,
                lambda figure: plots.plot_constants(groups, axes=figure.subplots(2, 1)),
                max(0.9 * WIDTH, 2.2 + 0.45 * len(groups)),
            ),
        )
        yield (
            "groups",
            "Smoothness against the gradient norm, module by module",
            "All panels have the same axes, so that the modules can be compared.",
            lambda name: draw_own(name, lambda: _canvas(plots.plot_groups(frame, fits=groups)[0])),
        )
    if (history := run.history) is not None:
        yield (
            "clipping",
            "Measured lengths and the longest step of AutoClip",
            "AutoClip shortened the steps that would have been longer than the black line.",
            lambda name: draw(
                name, lambda figure: plots.plot_clipping(frame, history=history, ax=figure.subplots()), 0.9 * WIDTH
            ),
        )
    if fit is not None:
        yield (
            "evidence",
            "Evidence for and against the line",
            "Residuals, lines at other quantiles, pairs of L0 and L1 that cover every row, and rival models.",
            lambda name: draw(name, lambda figure: _draw_fit(figure, fit, frame), 3.6 * WIDTH),
        )


def thinned(run: Run, figures: list[Figure]) -> list[str]:
    """Returns what the figures of a large trace do not show as shapes, in sentences."""
    titles = [figure.title for figure in figures if figure.drawing.is_thinned]
    if not titles:
        return []
    return [
        f"{counted(len(run.frame), 'row')} make many marks. So the marks of these figures are pixels, and do not stay "
        f"sharp when you zoom in: {'; '.join(titles)}. No row is left out of the figures, of the tables or of the fit."
    ]


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


def _draw_rates(figure: Canvas, step: Any, rate: Any) -> None:
    import seaborn as sns

    ax = figure.subplots()
    ax.step(step, rate, where="post", color=sns.color_palette("colorblind")[0], linewidth=1.2)
    ax.set(xlabel="step", ylabel="learning rate\n[x$^2$/f]", ylim=(0, None))
    sns.despine(ax=ax)


def _draw_fit(figure: Canvas, fit: SmoothnessFit, frame: pd.DataFrame) -> None:
    from smoothdiag.plots import plot_fit

    plot_fit(fit, frame, axes=figure.subplots(4, 1))

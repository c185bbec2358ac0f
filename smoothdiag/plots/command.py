"""The subcommand ``smoothdiag plot``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from smoothdiag import console
from smoothdiag.plots.clipping import plot_clipping
from smoothdiag.plots.fit import plot_fit
from smoothdiag.plots.groups import plot_constants, plot_groups
from smoothdiag.plots.over_steps import plot_trace
from smoothdiag.plots.saving import save
from smoothdiag.plots.sharpness import plot_sharpness
from smoothdiag.plots.smoothness import plot_smoothness
from smoothdiag.plots.spikes import plot_spikes
from smoothdiag.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from smoothdiag.fits.base import SmoothnessFit
    from smoothdiag.fits.groups import GroupFits

KINDS: Final = {
    "smoothness": "smoothness against the gradient norm",
    "trace": "loss, gradient norm and smoothness over the steps",
    "fit": "the evidence for and against the fit",
    "groups": "every parameter group",
    "constants": "L0 and L1 of every run, or of every parameter group of a single run",
    "sharpness": "curvature over the steps, and the limit where the optimizer turns unstable",
    "clipping": "the steps, and the longest that AutoClip allows",
    "spikes": "the spikes that SpikeGuard has seen, and why they happened",
}
"""What each kind of figure draws."""

_WIDTH: Final = 6.4
"""Width of all figures in inches."""


def add_command(
    commands: Any,
    rows: argparse.ArgumentParser,
    fitted: Callable[[argparse.Namespace], SmoothnessFit],
    fitted_groups: Callable[[argparse.Namespace], GroupFits],
) -> None:
    """Adds the subcommand ``plot`` to the command line.

    Args:
        commands: The subcommands.
        rows: The arguments of all commands that read traces.
        fitted: Fits the rows that arguments ask for.
        fitted_groups: Fits every parameter group of these rows.
    """
    kinds = "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())
    parser = commands.add_parser(
        "plot",
        help="draw a trace or its fit, as PNG, SVG or PDF",
        description="Draw a trace or its fit. Without a kind, draw smoothness against the gradient norm, and the fit "
        "beside it.",
        parents=[rows],
    )
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="image: .png, .svg or .pdf (default: TRACE.KIND.png)"
    )
    parser.add_argument("--history", type=Path, action="append", metavar="CSV", help=_HISTORY)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--kind", choices=KINDS, metavar="KIND", help=f"what to draw; {kinds}")
    for flag, kind in (("--over-steps", "trace"), ("--sharpness", "sharpness")):
        which.add_argument(flag, dest="kind", action="store_const", const=kind, help=f"the same as --kind {kind}")
    which.add_argument("--by-group", action="store_true", help="draw groups and, beside it, constants")

    def run(arguments: argparse.Namespace) -> None:
        first = arguments.kind or ("groups" if arguments.by_group else "smoothness")
        beside = {"groups": "constants", "smoothness": "fit"}[first] if arguments.kind is None else None
        out = arguments.out or arguments.traces[0].with_suffix(f".{first}.png")
        paths = {first: out if out.suffix else out.with_suffix(".png")}
        if beside:
            stem = paths[first].name.removesuffix(paths[first].suffix).removesuffix(f".{first}")
            paths[beside] = paths[first].with_name(f"{stem}.{beside}{paths[first].suffix}")
        figures = _Figures(arguments, fitted, fitted_groups)
        for path, figure in [(path, figures.draw(kind)) for kind, path in paths.items()]:
            save(figure, path)
            print(console.one_line(path))

    parser.set_defaults(run=run)


_HISTORY: Final = (
    "of --kind clipping: what `clipper.history.to_csv(CSV)` wrote, one for each trace; needed if the trace does not "
    "tell the longest step"
)


class _Figures:
    """Draws the figures that arguments ask for; fits once."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        fitted: Callable[[argparse.Namespace], SmoothnessFit],
        fitted_groups: Callable[[argparse.Namespace], GroupFits],
    ) -> None:
        self._arguments, self._fitted, self._fitted_groups = arguments, fitted, fitted_groups
        self._runs = {_name(path, arguments.traces): Trace.read(path) for path in arguments.traces}
        self._fits: Any = None

    def draw(self, kind: str) -> Figure:
        """Returns a figure of a kind."""
        figure: Figure = getattr(self, f"_draw_{kind}")()
        return figure

    def _draw_smoothness(self) -> Figure:
        figure, fit = _figure(4.8), self._fit()
        plot_smoothness(self._data(), fit=fit, group=fit.group, ax=figure.subplots())
        return figure

    def _draw_fit(self) -> Figure:
        figure = _figure(7.7)
        plot_fit(self._fit(), self._data(), axes=figure.subplots(2, 2))
        return figure

    def _draw_trace(self) -> Figure:
        figure, estimator = _figure(6.4), console.once(self._arguments, "estimator")
        runs = self._runs if len(self._runs) > 1 else next(iter(self._runs.values()))
        plot_trace(runs, estimator=estimator, group=self._group(), ax=figure.subplots(3, sharex=True))
        return figure

    def _draw_groups(self) -> Figure:
        self._fits = self._fits or self._fitted_groups(self._arguments)
        figure: Figure = plot_groups(self._data(), fits=self._fits)[0].figure
        return figure

    def _draw_constants(self) -> Figure:
        if len(self._runs) > 1 and not self._arguments.by_group:
            each = [argparse.Namespace(**vars(self._arguments) | {"traces": [path]}) for path in self._arguments.traces]
            fits: Any = dict(zip(self._runs, map(self._fitted, each), strict=True))
        else:
            fits = self._fits = self._fits or self._fitted_groups(self._arguments)
        figure = _figure(max(2.9, 1.7 + 0.3 * len(fits)))
        plot_constants(fits, axes=figure.subplots(1, 2, sharey=True))
        return figure

    def _draw_sharpness(self) -> Figure:
        group, estimators = self._group(), self._arguments.estimator
        return self._one_below_the_other(
            lambda trace, ax, _: plot_sharpness(trace, estimators=estimators, group=group, ax=ax)
        )

    def _draw_spikes(self) -> Figure:
        return self._one_below_the_other(lambda trace, ax, _: plot_spikes(trace, ax=ax))

    def _draw_clipping(self) -> Figure:
        import pandas as pd

        files = self._arguments.history or [None] * len(self._runs)
        if len(files) != len(self._runs):
            runs = console.counted(len(self._runs), "trace")
            raise ValueError(f"Parameter `--history` should be given once for each of {runs}. Found {len(files)}.")
        histories = [None if path is None else pd.read_csv(path) for path in files]
        return self._one_below_the_other(lambda trace, ax, place: plot_clipping(trace, history=histories[place], ax=ax))

    def _one_below_the_other(self, plot: Callable[[Trace, Any, int], object]) -> Figure:
        figure = _figure(4.0 * len(self._runs) + 0.8 * (len(self._runs) == 1))
        panels = figure.subplots(len(self._runs), sharex=True, squeeze=False).ravel()
        for place, (panel, (name, trace)) in enumerate(zip(panels, self._runs.items(), strict=True)):
            if len(self._runs) > 1:
                panel.set_title(name, size="medium")
            plot(trace, panel, place)
            panel.xaxis.set_tick_params(labelbottom=True)
        return figure

    def _fit(self) -> SmoothnessFit:
        self._fits = self._fits or self._fitted(self._arguments)
        fit: SmoothnessFit = self._fits
        return fit

    def _data(self) -> Any:
        return list(self._runs.values())

    def _group(self) -> str:
        return console.once(self._arguments, "group") or "all"


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _name(path: Path, paths: list[Path]) -> str:
    """Returns the name of a run: that of its file, with its folder if another file has the same name."""
    return path.stem if sum(path.stem == other.stem for other in paths) == 1 else str(path)

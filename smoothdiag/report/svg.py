"""svg: figures as text inside a page, the same bytes every time, readable on light and on dark pages."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH: Final = 4.6
"""Width of a figure in inches. On a phone its letters are about eleven pixels high, and on a desk two stand abreast."""

MOST_MARKS: Final = 2000
"""Marks of one figure above which they are drawn as pixels: as shapes, 50,000 rows would weigh ten megabytes."""

_FEW: Final = 100
"""Marks of one artist that stay shapes in any figure, such as a line between few points."""

_DPI: Final = 220
"""Pixels per inch of what is drawn as pixels: a thousand over the width, which is sharp on a page of two columns."""

_STYLE: Final = {
    "svg.hashsalt": "smoothdiag",  # without it, names inside the figure are drawn at random
    "svg.fonttype": "path",  # letters as shapes look the same on a machine that lacks the font
    "figure.figsize": (WIDTH, 0.8 * WIDTH),
    "agg.path.chunksize": 20_000,
}

_COMMENT: Final = re.compile(r"<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", re.DOTALL)
_SIZE: Final = re.compile(
    r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"|(<svg[^>]*?) width="[^"]*"([^>]*?) height="[^"]*"'
)
_NAME: Final = re.compile(r'( id="|href="#|url\(#)')
_GREY: Final = re.compile(r"(fill|stroke): #([0-9a-f]{2})\2\2(?![0-9a-f])")


@dataclass(frozen=True)
class Drawing:
    """A figure, or why there is none.

    Attributes:
        svg: The element; empty if the figure could not be drawn.
        is_thinned: Whether a part of it is drawn as pixels.
        fault: Why there is no figure; empty if there is one.
    """

    svg: str
    is_thinned: bool = False
    fault: str = ""


def draw(prefix: str, plot: Callable[[Figure], object], height: float) -> Drawing:
    """Returns what a function draws on a figure of `WIDTH` inches.

    Args:
        prefix: Begins every name inside the figure, so that figures of one page do not share names.
        plot: Draws on the figure that it is given.
        height: Height of the figure in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _own_style():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        return _drawn(prefix, lambda: (plot(figure), figure)[1])


def draw_own(prefix: str, plot: Callable[[], Figure]) -> Drawing:
    """Returns what a function draws on a figure of its own, which pyplot then forgets."""
    from matplotlib import pyplot as plt

    before = set(plt.get_fignums())
    try:
        with _own_style():
            return _drawn(prefix, plot)
    finally:
        for number in set(plt.get_fignums()) - before:
            plt.close(number)


def greys(text: str) -> list[str]:
    """Returns the greys that drawings use, as two hexadecimal digits each."""
    return sorted(set(re.findall(r"var\(--ink-([0-9a-f]{2})\)", text)))


def _drawn(prefix: str, plot: Callable[[], Figure]) -> Drawing:
    try:
        figure = plot()
        is_thinned = _thin(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, dpi=_DPI, metadata={"Date": None, "Creator": None})
    except Exception as error:  # one figure less is better than no page
        return Drawing("", fault=" ".join(str(error).split()) or type(error).__name__)
    return Drawing(_inline(out.getvalue(), prefix), is_thinned)


def _thin(figure: Figure) -> bool:
    """Makes pixels of the marks of a figure if there are many, and returns whether it did."""
    marks: list[tuple[Any, int]] = []
    for ax in figure.axes:
        marks += [(line, len(np.atleast_1d(line.get_xdata()))) for line in ax.lines]
        marks += [(cloud, len(np.asarray(cloud.get_offsets()))) for cloud in ax.collections]
    if sum(number for _, number in marks) <= MOST_MARKS:
        return False
    for artist, number in marks:
        if number > _FEW:
            artist.set_rasterized(True)
    return True


def _inline(text: str, prefix: str) -> str:
    """Returns the element of a file, without what belongs to a file alone, and with colours that follow the page."""
    text = _COMMENT.sub("", text[text.index("<svg") :])
    text = _SIZE.sub(lambda found: "".join(part or "" for part in found.groups()), text, count=1)
    text = _NAME.sub(rf"\g<1>{prefix}-", text)
    # The ink of the page is black on light pages and white on dark ones, and so are the greys between.
    text = _GREY.sub(lambda found: f"{found[1]}: {_ink(found[2])}", text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _ink(grey: str) -> str:
    return "currentColor" if grey == "00" else f"var(--ink-{grey})"


@contextmanager
def _own_style() -> Iterator[None]:
    """Draws in matplotlib's own style, whatever the user has set, and without its warnings."""
    from matplotlib import style

    with style.context(["default", _STYLE], after_reset=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

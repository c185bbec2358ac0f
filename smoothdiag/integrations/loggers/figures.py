"""Figures: draws a plot of its own, without touching the user's figures or backend, and returns its pixels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from smoothdiag.integrations.loggers.sink import Pixels
from smoothdiag.rows import SmoothdiagWarning

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pixels_of(plot: Callable[[Axes], object]) -> Pixels | None:
    """Returns a figure of 960 x 720 pixels, RGBA; None, with a warning, if it cannot be drawn.

    Args:
        plot: Draws on the axes that it is given.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    try:
        plot(figure.subplots())
        canvas.draw()
    except Exception as error:
        warnings.warn(f"The log gets no figure, because it could not be drawn: {error}", SmoothdiagWarning)
        return None
    return np.asarray(canvas.buffer_rgba())

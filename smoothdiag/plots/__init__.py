"""Figures of traces and fits: smoothness against the gradient norm, both over the steps, curvature, constants.

The functions draw on the axes that they are given and return them. They change neither the style nor the backend nor
any other figure. Importing this package loads neither matplotlib nor seaborn.
"""

from smoothdiag.plots.benefit import plot_benefit
from smoothdiag.plots.clipping import plot_clipping
from smoothdiag.plots.fit import plot_fit
from smoothdiag.plots.groups import plot_constants, plot_groups
from smoothdiag.plots.over_steps import plot_trace
from smoothdiag.plots.sharpness import plot_sharpness
from smoothdiag.plots.smoothness import plot_smoothness
from smoothdiag.plots.spikes import plot_spikes

__all__ = [
    "plot_benefit",
    "plot_clipping",
    "plot_constants",
    "plot_fit",
    "plot_groups",
    "plot_sharpness",
    "plot_smoothness",
    "plot_spikes",
    "plot_trace",
]

"""Optimizers from the papers. They need no measurement, so they also work alone."""

from smoothdiag.optim.clipped_momentum import ClippedMomentum
from smoothdiag.optim.clipped_update import clipped_momentum_update
from smoothdiag.optim.descent import Clipped, GradientDescent, LogSmoothed, Normalized, Smoothed
from smoothdiag.optim.ggnc import GGNC
from smoothdiag.optim.scion import ClippedScion, scion_groups, scion_init_

__all__ = [
    "GGNC",
    "Clipped",
    "ClippedMomentum",
    "ClippedScion",
    "GradientDescent",
    "LogSmoothed",
    "Normalized",
    "Smoothed",
    "clipped_momentum_update",
    "scion_groups",
    "scion_init_",
]

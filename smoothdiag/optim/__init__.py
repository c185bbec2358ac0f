"""Optimizers of the papers; they need no measurement and serve someone who makes none."""

from smoothdiag.optim.clipped_momentum import ClippedMomentum
from smoothdiag.optim.clipped_update import clipped_momentum_update

__all__ = ["ClippedMomentum", "clipped_momentum_update"]

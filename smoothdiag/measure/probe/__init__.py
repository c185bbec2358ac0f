"""A training loop that is watched, and measured at chosen steps."""

from smoothdiag.measure.probe.probe import Probe

__all__ = ["Probe"]

"""The probe: watches a training loop and measures at chosen steps."""

from smoothdiag.measure.probe.probe import Probe

__all__ = ["Probe"]

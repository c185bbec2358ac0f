"""AutoClip: the longest step of a run, from what the run itself shows in its first steps."""

from smoothdiag.autoclip.calibration import StepRule
from smoothdiag.autoclip.clipper import AutoClip

__all__ = ["AutoClip", "StepRule"]

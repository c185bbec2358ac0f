"""AutoClip: the longest step of a run, from what the run itself shows in its first steps."""

from smoothdiag.autoclip.calibration import StepRule
from smoothdiag.autoclip.clipper import GRADIENT_RULE, UPDATE_RULE, AutoClip

__all__ = ["GRADIENT_RULE", "UPDATE_RULE", "AutoClip", "StepRule"]

"""AutoClip: the longest step of a run, from what the run itself shows in its first steps."""

from smoothdiag.autoclip.calibration import UPDATE_RULE, StepRule
from smoothdiag.autoclip.clipper import AutoClip

__all__ = ["UPDATE_RULE", "AutoClip", "StepRule"]

"""From fitted constants to what a run should do: a threshold with a reason, or a rate for every step."""

from smoothdiag.clipping.rate import StepRate, step_rate
from smoothdiag.clipping.rule import ClipRule, clip_rule, safe_threshold
from smoothdiag.clipping.table import clip_table

__all__ = ["ClipRule", "StepRate", "clip_rule", "clip_table", "safe_threshold", "step_rate"]

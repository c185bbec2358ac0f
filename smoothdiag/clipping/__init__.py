"""From a fit to advice for a run: a clipping threshold with a reason, or a learning rate for every step."""

from smoothdiag.clipping.law import LawRate, PowerLaw
from smoothdiag.clipping.rate import StepRate, step_rate
from smoothdiag.clipping.result import ClipRule
from smoothdiag.clipping.rule import clip_rule, safe_threshold
from smoothdiag.clipping.table import clip_table

__all__ = ["ClipRule", "LawRate", "PowerLaw", "StepRate", "clip_rule", "clip_table", "safe_threshold", "step_rate"]

"""Thresholds: what PyTorch does with a threshold that is negative, zero, infinite or no number."""

from __future__ import annotations

import math
from typing import Final

_BY_NORM: Final = {
    "negative": "PyTorch multiplies the gradient by {limit}/norm, a negative number: this line reversed the gradient, "
    "and the step goes uphill",
    "zero": "PyTorch multiplies the gradient by 0/norm: this line erased the gradient, and the step learns nothing",
    "minus infinity": "PyTorch multiplies the gradient by -inf: this line made every entry infinite, and every zero "
    "NaN",
    "not a number": "PyTorch multiplies the gradient by NaN: this line made every entry NaN, and the step does the "
    "same to the weights",
    "infinity": "nothing is ever shortened, and nobody reads a norm from this line. Once the norm is infinite, it "
    "makes gradients NaN",
}
_BY_VALUE: Final = {
    "negative": "PyTorch first raises every entry to at least {other}, then cuts it at {limit}: this line set every "
    "entry to {limit}, whatever it was",
    "zero": "PyTorch cuts every entry at 0 from both sides: this line erased the gradient, and the step learns nothing",
    "minus infinity": "PyTorch cuts every entry at -inf: this line set every entry to -inf",
    "not a number": "PyTorch compares every entry with NaN: this line made every entry NaN, and the step does the same "
    "to the weights",
    "infinity": "no entry is larger than that: this line never changes a gradient",
}


def kind(limit: float) -> str:
    """Returns what is wrong with a threshold; empty if it is a positive number."""
    if math.isnan(limit):
        return "not a number"
    if math.isinf(limit):
        return "infinity" if limit > 0 else "minus infinity"
    return "negative" if limit < 0 else "zero" if limit == 0 else ""


def effect(name: str, limit: float) -> str:
    """Returns what the call with this threshold did to the gradient, as measured with PyTorch 2.13.

    Args:
        name: Name of the threshold, ``"max_norm"`` or ``"clip_value"``.
        limit: The threshold, of a kind that has no meaning.
    """
    texts = _BY_VALUE if name == "clip_value" else _BY_NORM
    return f"{name}={limit:g}: " + texts[kind(limit)].format(limit=f"{limit:g}", other=f"{-limit:g}")

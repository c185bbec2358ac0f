"""Advice: what AutoClip does to the steps of a run at present, and what to do about it, a sentence each."""

from __future__ import annotations

import math
from typing import NamedTuple

from smoothdiag.autoclip.calibration import PHASE, Calibration

UNSEEN = 3
"""Steps without any row after which AutoClip says that the probe sees no batches: it measures each of the first."""

STATUSES = "docs/statuses.md"


class Facts(NamedTuple):
    """What else a reader of `AutoClip.reason` has to know.

    Attributes:
        mode: Mode of AutoClip.
        steps: Steps since AutoClip joined the run.
        stopped: Whether AutoClip acts no more.
        diverged: Why the run does not say where to clip; empty if it does, or if AutoClip acts.
        clipped_at: Step whose gradient something else had clipped, or -1.
    """

    mode: str
    steps: int
    stopped: bool
    diverged: str
    clipped_at: int


def next_step(calibration: Calibration, facts: Facts, *, acts_by: str) -> str:
    """Returns what to do about AutoClip now, in a sentence; ``acts_by`` is the mode in which it acts."""
    if facts.stopped:
        return "AutoClip acts no more; the last event of its `history` says why."
    if facts.diverged:
        return f'begin again with mode="{acts_by}": AutoClip then keeps the steps short from the first one on.'
    if facts.clipped_at >= 0 and facts.mode != "shadow":
        return (
            f"clip nowhere else: the gradient of step {facts.clipped_at} reached AutoClip shorter than measured. "
            "Remove clip_grad_norm_ from the loop, and the trainer's setting that calls it."
        )
    if calibration.rule.multiple is not None and calibration.held_at < 0:
        if facts.steps >= UNSEEN and not calibration.measurements and not calibration.invalid:
            return (
                f"show the probe the batches: it has measured none of {facts.steps} steps. Loop over "
                "probe.watch(loader), or call probe.observe(batch) before each forward pass."
            )
        if facts.steps > PHASE:
            return f"see {STATUSES}: too few of the rows could be used, so AutoClip goes on measuring."
        return f"train on: it measures in the first {PHASE} steps and then holds the longest step."
    if facts.mode == "shadow":
        return f'mode="{acts_by}" makes it act; in shadow mode it only counts.'
    if (saturated := sum(m.saturated for m in calibration.early)) > len(calibration.early) / 2:
        return (
            f'compare the loss with a run in mode="shadow": {saturated} of {len(calibration.early)} measurements are '
            "saturated, so the longest step is a guess: it tells how far AutoClip looked, and hardly the "
            "curvature of the loss."
        )
    return "nothing to do; sd.plot_clipping(clipper) shows what it did."


def kept(longest: float, threshold: float, lr: float, facts: Facts, *, acts_by: str) -> str:
    """Returns how long steps are, in words; ``threshold`` is finite if it limits the norm of gradients."""
    if facts.diverged:
        return f"nothing is clipped in shadow mode, and where to clip does not follow, because {facts.diverged}"
    if math.isnan(longest):
        return "no step is limited yet"
    said = f"no step is longer than {longest:.3g}"
    if facts.mode == "shadow":
        said = f'nothing is clipped in shadow mode; mode="{acts_by}" would keep steps within {longest:.3g}'
    return said + (f", which is max_norm={threshold:.3g} at lr={lr:.3g}" if math.isfinite(threshold) else "")

"""The two lines that stand above everything else about a fit: the verdict, and what to do next, in plain words."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from smoothdiag.console import counted
from smoothdiag.fits.decision import Decision, Do, exponent_of
from smoothdiag.fits.parts import Verdict
from smoothdiag.fits.text import minutes, number

SCAN_GRADIENTS = 500  # Default budget of `sd.scan`.
GLOSSARY = "docs/glossary.md explains the terms of this summary"
FURTHER = (
    "let the lines go further (sd.scan with a larger max_distance=, max_loss= or points=), or add lines along which "
    "the gradient norm changes more (toward= other checkpoints, update=)"
)

_UNUSED = "do not use L0 and L1"
_NONE = "L0 and L1 make no threshold for them"


class Headline(NamedTuple):
    """The verdict of a fit and what to do next, a line each.

    Attributes:
        verdict: the verdict and what it means, one sentence.
        next: what to do next, one sentence.
    """

    verdict: str
    next: str

    def __str__(self) -> str:
        return "\n".join(self)


def verdict_of(fit: Any) -> str:
    """The verdict of a SmoothnessFit and what it means, in one line (this module stands below that class)."""
    rows = counted(fit.num_points, "row") if not fit.num_scans else counted(fit.num_points, "point") + " of a scan"
    do = "does" if fit.num_points == 1 else "do"
    said = {
        Verdict.L0L1: (
            f"smoothness grows with the gradient norm: L0 = {number(fit.L0)} and L1 = {number(fit.L1)} can be used."
        ),
        Verdict.CONSTANT: "smoothness hardly depends on the gradient norm; one constant bounds it.",
        Verdict.POWER: f"smoothness grows as {_power(fit)} of the gradient norm; {_UNUSED}.",
        Verdict.LOSS_GAP: f"smoothness follows the loss and not the gradient norm; {_UNUSED}.",
        Verdict.NOT_IDENTIFIED: f"{rows} {do} not determine L0 and L1; do not use them.",
        Verdict.ARTEFACT: f"the numbers show how they were measured, not the loss; {_UNUSED}.",
    }
    return f"VERDICT {fit.verdict.name}: {said[fit.verdict]}"


def next_step(fit: Any, decision: Decision, *, is_confirmed: bool) -> str:
    """What to do next, in one sentence.

    Args:
        fit: the SmoothnessFit.
        decision: the next step.
        is_confirmed: whether no further direction has to be measured.
    """
    there = "another" if fit.num_scans else "this"
    time = minutes(decision.minutes) if math.isfinite(decision.minutes) else ""
    cost = f", about {decision.gradients:.0f} gradients" if math.isfinite(decision.gradients) else ""
    cost += f" and {time}" if cost and time else ""
    more = f"{decision.more:.0f} " if math.isfinite(decision.more) else ""
    here = f", here {time}" if time else ""
    confirm = "" if is_confirmed else "; sd.HessianNorm() or sd.scan would confirm it"
    lead = "do not clip; " if fit.verdict is Verdict.CONSTANT else ""
    said = {
        Do.THRESHOLD: f"sd.clip_rule(fit, lr=...) makes a threshold{confirm}",
        Do.RATE: f"{lead}sd.step_rate(fit) makes a rate{confirm}",
        Do.WARMUP: f"sd.LossGapWarmup(optimizer, fit) makes a rate{confirm}",
        Do.AUTOCLIP: f"let sd.AutoClip keep the updates of {fit.optimizer or 'this run'} short; {_NONE}",
        Do.KEEP: "keep AutoClip in the loop, and set no other threshold",
        Do.ACT: 'let the AutoClip of this run act (mode="clip"); in shadow mode it only counts',
        Do.PROBE: "record rows with sd.Probe, whose check against artefacts these rows could not have",
        Do.REMEDY: decision.remedy,
        Do.LINES: f"scan again along lines of other kinds (toward=, update=){cost}",
        Do.ROWS: f"record {more}more rows like these{cost}",
        Do.SCAN: f"scan {there} checkpoint: sd.scan(model, loss_fn, batches), about {SCAN_GRADIENTS} gradients{here}",
    }
    return f"{said[decision.do]}."


def _power(fit: Any) -> str:
    exponent = exponent_of(fit)
    return "a power" if math.isnan(exponent) else f"the power {exponent:.2f}"

"""What a fit is made of: its verdict, its flags, the scores of its rivals, its correction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Interval = tuple[float, float]


class Verdict(Enum):
    """The outcome of a fit in one word; the value says what it means."""

    L0L1 = "Smoothness grows with the gradient norm along a line, better than the rivals: L0 and L1 can be used."
    CONSTANT = "Smoothness does not depend on the gradient norm: the largest one is enough, and L1 is zero."
    POWER = "Smoothness follows a power of the gradient norm other than one: a line misses it."
    LOSS_GAP = "Smoothness follows the distance of the loss from its minimum rather than the gradient norm."
    NOT_IDENTIFIED = "The rows do not separate L0 from L1: too few, too narrow or too noisy."
    ARTEFACT = "The numbers say more about how they were measured than about the loss."


@dataclass(frozen=True)
class Flag:
    """A doubt about a fit.

    Attributes:
        name: short name.
        cause: what is wrong.
        evidence: the number that shows it.
        remedy: what to do.
        fatal: whether it makes the constants an artefact of the measurement.
        blocking: whether it leaves the law unidentified.
    """

    name: str
    cause: str
    evidence: str
    remedy: str
    fatal: bool = False
    blocking: bool = False


@dataclass(frozen=True)
class ModelScore:
    """One model of the comparison: smoothness = intercept + coefficient * grad_norm ** exponent.

    The loss gap has loss - floor where the others have the gradient norm. The isotonic model, any function that never
    falls, has no formula: its intercept is its height at the smallest gradient norm.

    Attributes:
        name: "constant", "affine", "power", "isotonic" or, where the losses are known, "loss gap".
        intercept: fitted on all rows.
        coefficient: fitted on all rows; zero for the constant.
        exponent: zero for the constant, one for the line, fitted for the power and the loss gap.
        loss: mean relative pinball loss on the rows it was fitted to.
        later_loss: the same on blocks of steps later than those it was fitted to; NaN with too few rows.
        skill: share of the constant's `later_loss` that the model removes; at or below zero: no better.
        skill_interval: interval of the skill.
        gain: share of the line's `later_loss` that the model removes.
        gain_interval: interval of the gain.
        floor: f* of the loss gap; NaN for the others.
    """

    name: str
    intercept: float
    coefficient: float
    exponent: float
    loss: float
    later_loss: float
    skill: float
    skill_interval: Interval
    gain: float
    gain_interval: Interval
    floor: float = math.nan


@dataclass(frozen=True)
class Correction:
    """The constants that gradient norms without errors would give, by simulation and extrapolation.

    Attributes:
        L0: corrected intercept.
        L1: corrected slope.
        deviation: median relative error of the gradient norms that was taken out, the largest that the recorded
            variance of the gradient allows: with less of it along the gradient, the truth is between these constants
            and the plain ones.
    """

    L0: float
    L1: float
    deviation: float

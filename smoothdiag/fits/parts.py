"""Parts of a fit: verdict, flags, scores of the rival models, constants corrected for errors of the gradient norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Interval = tuple[float, float]


class Verdict(Enum):
    """The outcome of a fit in one word; the value says what it means.

    Examples:
        >>> [verdict.name for verdict in sd.Verdict]
        ['L0L1', 'CONSTANT', 'POWER', 'LOSS_GAP', 'NOT_IDENTIFIED', 'ARTEFACT']
        >>> print(sd.Verdict.POWER.value)
        Smoothness follows a power of the gradient norm other than one: a line does not describe it.
    """

    L0L1 = (
        "Smoothness grows with the gradient norm, a line describes it, and no tested law is clearly better: L0 and L1 "
        "can be used."
    )
    CONSTANT = "Smoothness hardly depends on the gradient norm: one constant bounds it, and L1 can be taken as zero."
    POWER = "Smoothness follows a power of the gradient norm other than one: a line does not describe it."
    LOSS_GAP = "Smoothness follows the distance of the loss from its minimum rather than the gradient norm."
    NOT_IDENTIFIED = "These rows do not determine L0 and L1: do not use the constants."
    ARTEFACT = "The numbers say more about how they were measured than about the loss: do not use L0 and L1."

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Pickles by name, because texts change between versions."""
        return getattr, (type(self), self.name)


@dataclass(frozen=True)
class Flag:
    """A doubt about a fit.

    Attributes:
        name: short name.
        cause: what is wrong, and what that means for the fit.
        evidence: the numbers that show it.
        remedy: what to change.
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

    The loss gap model has loss - floor in place of the gradient norm, and the distance model of a scan the distance
    from the start. The isotonic model is the best function that never falls. It has no formula; its intercept is its
    height at the smallest gradient norm. For a scan, the losses are mean absolute errors of log smoothness, and the
    later ones are on lines left out of the fit.

    Attributes:
        name: "constant", "affine", "power", "isotonic", "distance" (scans) or, if the losses are known, "loss gap".
        intercept: fitted on all rows.
        coefficient: fitted on all rows; zero for the constant.
        exponent: zero for the constant, one for the line, fitted for the power and the loss gap.
        loss: mean relative pinball loss on the rows it was fitted to.
        later_loss: mean relative pinball loss on steps later than the fitted ones; NaN with too few rows.
        skill: share of the constant's `later_loss` that the model removes; at or below zero it is no better.
        skill_interval: interval of the skill.
        gain: share of the line's `later_loss` that the model removes.
        gain_interval: interval of the gain.
        floor: f* of the loss gap; NaN for the other models.
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
        deviation: median relative error of the gradient norms that was taken out. It is the largest error that the
            recorded variance of the gradient allows. If less of that variance lies along the gradient, the truth is
            between these constants and the plain ones.
    """

    L0: float
    L1: float
    deviation: float


@dataclass(frozen=True)
class HessianCheck:
    """What the Hessian norms beside the fitted rows say about the line.

    Attributes:
        num_rows: number of Hessian norms.
        coverage: share of them at or below the line.
        slope_interval: interval of the slope of a line through them, at the quantile of the fit [1/x].
        agrees: whether the line describes them too; None if there are too few to say.
    """

    num_rows: int
    coverage: float
    slope_interval: Interval
    agrees: bool | None

"""Self-test: is one gradient like the next, and is it the gradient of the training loop?"""

import math
import warnings
from dataclasses import dataclass

import torch

from smoothdiag import vectors
from smoothdiag.measure.objective import Evaluation, Objective
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.vectors import Vector

ROUNDING = {torch.float64: 2e-15, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Relative rounding error of one gradient by parameter dtype, rounded up from what small LSTMs, attention and
convolutional networks show against the next wider dtype (benchmarks/gradient_rounding.py; float64 and float16
scaled from float32 and bfloat16 by their unit roundoff)."""

SAME_DIRECTION = 1e-2
"""Angle between replayed and training gradient below which they count as one, if they repeat well."""

REPRODUCE_EVERY = 10
"""Measurements between two checks that the training gradient is still the replayed one, where it is reused."""

NOT_REPRODUCED = (
    "The gradient of loss_fn points elsewhere than the gradient the optimizer got, so another loss is measured than "
    "the one that is trained. Usual causes: part of the loss, an autocast region or augmentation outside loss_fn; "
    "random numbers drawn between watch or observe and the forward pass; batches that were not observed; clipping by "
    "value; a reduction of micro-batches other than the loop's."
)


@dataclass(frozen=True)
class SelfTest:
    """What the first measured step showed about the loss.

    Attributes:
        gradient_error: Relative error of one gradient evaluation: what rounding costs, or repetition shows.
        angle: Angle between the replayed gradient and the training gradient [rad]; NaN where there was none.
        ratio: Length of the training gradient over that of the replayed one.
        reproduced: Whether the two are equal bit for bit.
    """

    gradient_error: float
    angle: float
    ratio: float
    reproduced: bool


def self_test(objective: Objective, start: Vector, training: Vector | None) -> tuple[SelfTest, Evaluation]:
    """Returns the findings at ``start``, and the evaluation there; warns of what a user should mend.

    Args:
        objective: The loss on the data of the first measured step.
        start: The parameters before that step.
        training: The gradient that the training loop handed to the optimizer; ``None`` where it is not known.
    """
    once, again = objective.evaluate(start), objective.evaluate(start)
    length, difference = _norm(once.gradient), _norm(vectors.sub(once.gradient, again.gradient))
    # The difference of two gradients holds the error of both.
    repeat = difference / math.sqrt(2) / length if length and math.isfinite(difference) else 0.0
    # The coarsest dtype decides: its rounding is the largest.
    rounding = max(ROUNDING.get(g.dtype, ROUNDING[torch.bfloat16]) for g in once.gradient)
    error = max(rounding, repeat)
    if repeat > 100 * rounding:  # beyond what the order of additions on a GPU explains
        warnings.warn(
            f"Two gradients of the same loss on the same data differ by {difference / length:.1e} of their length, "
            "so rows may fall below the noise floor. Usual causes: loss_fn draws random numbers from a generator of "
            "its own, reads the next batch, or depends on state that changes from call to call. Measuring advances "
            "such state, which then alters the run.",
            SmoothdiagWarning,
        )
        return SelfTest(error, math.nan, math.nan, False), once
    if training is None:
        return SelfTest(error, math.nan, math.nan, False), once
    angle, ratio = compare(training, once.gradient)
    plain = not any(map(vectors.is_sharded, training))
    reproduced = plain and all(torch.equal(a, b) for a, b in zip(training, once.gradient, strict=True))
    if same_direction(training, once.gradient, error):
        _warn_of_reduction(ratio, objective.num_micro_batches)
    return SelfTest(error, angle, ratio, reproduced), once


def compare(training: Vector, replayed: Vector) -> tuple[float, float]:
    """Returns the angle [rad] from the replayed to the training gradient, and the ratio of their lengths.

    NaN where one of them is zero or not finite.
    """
    size, length = _norm(training), _norm(replayed)
    if not (size and length and math.isfinite(size) and math.isfinite(length)):
        return math.nan, math.nan
    # Half the chord between the unit vectors: an arc cosine would lose half of the digits.
    chord = _norm(vectors.sub([g / size for g in training], [g / length for g in replayed]))
    return 2 * math.asin(min(1.0, chord / 2)), size / length


def same_direction(training: Vector, replayed: Vector, gradient_error: float) -> bool:
    """Returns whether two gradients point the same way, as far as rounding and repetition let one tell."""
    coarsest = max(gradient_error, *(ROUNDING.get(g.dtype, ROUNDING[torch.bfloat16]) for g in training))
    return not compare(training, replayed)[0] > 10 * coarsest + SAME_DIRECTION


def _warn_of_reduction(ratio: float, num_micro_batches: int) -> None:
    for reduction, factor in (("sum", num_micro_batches), ("mean", 1 / num_micro_batches)):
        if num_micro_batches > 1 and abs(ratio / factor - 1) < 1e-3:
            warnings.warn(
                f"The gradient the optimizer got is {factor:.3g} times the one measured, from {num_micro_batches} "
                f'micro-batches: the loop adds them up otherwise. Pass reduction="{reduction}".',
                SmoothdiagWarning,
            )


def _norm(a: Vector) -> float:
    return float(vectors.norm(a))

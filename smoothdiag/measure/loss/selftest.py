"""Self-test: is one gradient like the next, and is it the gradient of the training loop?"""

import math
import warnings
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.measure.loss.coordinates import forward_dtypes
from smoothdiag.measure.loss.graph import nodes_of
from smoothdiag.measure.loss.objective import Evaluation, Objective, Reduction
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.vectors import Vector

ROUNDING = {torch.float64: 2e-15, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Relative rounding error of one gradient by parameter dtype, rounded up from what small LSTMs, attention and
convolutional networks show against the next wider dtype (benchmarks/gradient_rounding.py; float64 and float16
scaled from float32 and bfloat16 by their unit roundoff)."""

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Relative distance at which a number in a narrow dtype is rounded to another one."""

LOSS_SCALE = 2.0**16
"""Scale of the loss where part of the model computes in float16: what GradScaler starts from."""

SLACK = 1e-3
"""Relative difference of replayed and training gradient, beyond ten times the rounding, below which they count as one:
additions in another order, and kernels that a device chooses anew, explain that much."""

EXACT_SLACK = 1e-4
"""The same where the two were equal bit for bit at the self-test."""

RETEST_EVERY = 10
"""Measurements between two estimates of rounding, where part of the loss is computed in a narrow dtype."""


class Doubt(Enum):
    """Why the loss that is measured may not be the one that is trained; each value says what to look for."""

    DIRECTION = (
        "The gradient of loss_fn is another one than the gradient the optimizer got: it points elsewhere, so another "
        "loss is measured than the one that is trained. Usual causes: part of the loss, an autocast region or "
        "augmentation outside loss_fn; state of the loop that loss_fn reads and that has moved on, as a hidden state; "
        "random numbers drawn between watch or observe and the forward pass; batches that were not observed."
    )
    LENGTH = (
        "The gradient that backward left is {ratio:.3g} times as long as that of loss_fn, in the same direction: "
        "another loss is measured than the one that is trained, a multiple of it. Gradient norms, L0 and thresholds "
        "are off by this factor. Usual causes: a sum over the batch in the place of a mean; a factor that the loop "
        "alone applies, as that of a loss scale or of accumulation; micro-batches that add up otherwise than "
        "`reduction` says. Let loss_fn return what the loop calls backward on."
    )
    REDUCTION = (
        "The gradient that backward left is {ratio:.3g} times the one measured, from {number} micro-batches: the loop "
        "adds them up otherwise, so another loss is measured than the one that is trained. "
        'Pass reduction="{reduction}". If the loop divides the gradients itself once all have come, and clips them '
        "then, the measurement is right as it is: let the loop divide the losses instead."
    )


@dataclass(frozen=True)
class SelfTest:
    """What the first measured step showed about the loss.

    Attributes:
        gradient_error: Relative error of one gradient evaluation: what rounding costs, or repetition shows.
        angle: Angle between the replayed gradient and the training gradient [rad]; NaN where there was none.
        ratio: Length of the training gradient over that of the replayed one.
        reproduced: Whether the two are equal bit for bit.
        narrow: The dtype narrower than the gradient's that part of the loss is computed in, as under autocast.
        loss_scale: Scale of the loss that gradients are to be taken with.
        frozen: The dtype narrower than the gradient's that parameters outside x have in training alone.
    """

    gradient_error: float
    angle: float = math.nan
    ratio: float = math.nan
    reproduced: bool = False
    narrow: torch.dtype | None = None
    loss_scale: float = 1.0
    frozen: torch.dtype | None = None

    def doubt(
        self,
        training: Vector,
        replayed: Vector,
        *,
        has_length: bool,
        num_micro_batches: int,
        reduction: Reduction = "mean",
        arrived: float = math.nan,
    ) -> tuple[Doubt, str] | None:
        """Returns why two gradients are not of the same loss, as far as rounding lets one tell; ``None`` if they are.

        Args:
            training: The gradient of the loop.
            replayed: That of ``loss_fn``.
            has_length: Whether the length of the former counts: clipping and scaling change it.
            num_micro_batches: Micro-batches in the loss.
            reduction: How they add up in ``loss_fn``.
            arrived: Length of the gradient that the optimizer got; NaN where it is that of the loop, or not known.
        """
        dtypes = {g.dtype for g in training} | ({self.frozen} if self.frozen else set())
        coarsest = max(self.gradient_error, *map(rounding, dtypes))
        tolerance = 10 * coarsest + (EXACT_SLACK if self.reproduced else SLACK)
        angle, ratio = compare(training, replayed)
        if angle > tolerance:
            return Doubt.DIRECTION, Doubt.DIRECTION.value
        length = _norm(replayed)
        if not has_length and abs(arrived - length) <= tolerance * length:
            return None  # the loop took out afterwards what it had put in, as one that divides when all have come
        other, factor = ("sum", num_micro_batches) if reduction == "mean" else ("mean", 1 / num_micro_batches)
        if num_micro_batches > 1 and abs(ratio / factor - 1) < SLACK:
            said = Doubt.REDUCTION.value.format(ratio=ratio, number=num_micro_batches, reduction=other)
            return Doubt.REDUCTION, said
        if has_length and abs(ratio - 1) > tolerance:
            return Doubt.LENGTH, Doubt.LENGTH.value.format(ratio=ratio)
        return None


def self_test(objective: Objective, start: Vector, training: Vector | None) -> tuple[SelfTest, Evaluation]:
    """Returns the findings at ``start``, and the evaluation there; warns of what a user should mend.

    Args:
        objective: The loss on the data of the first measured step.
        start: The parameters before that step.
        training: The gradient of the training loop; ``None`` where it is not known.
    """
    dtypes = set[torch.dtype]()
    once = objective.evaluate(start, lambda loss: dtypes.update(dtypes_of(loss)))
    if torch.float16 in dtypes and objective.loss_scale == 1:
        objective.loss_scale = LOSS_SCALE
        once = objective.evaluate(start)
    again = objective.evaluate(start)
    length, difference = _norm(once.gradient), _norm(vectors.sub(once.gradient, again.gradient))
    # The difference of two gradients holds the error of both.
    repeat = difference / math.sqrt(2) / length if length and math.isfinite(difference) else 0.0
    # The coarsest dtype decides: its rounding is the largest.
    coarsest = max(rounding(g.dtype) for g in once.gradient)
    narrow = _narrowest((dtypes | forward_dtypes(objective.model)) - {g.dtype for g in once.gradient})
    error = max(coarsest, repeat)
    if narrow is not None and length:
        error = max(error, _rounding_error(objective, start, once, narrow))
    # A base in bfloat16 below adapters in float32 is widened while it is measured: training was rounded, this is not.
    frozen = _narrowest(objective.widened_dtypes)
    test = SelfTest(error, narrow=narrow, loss_scale=objective.loss_scale, frozen=frozen)
    # beyond what the order of additions on a GPU explains
    if repeat > max(100 * coarsest, 0.0 if narrow is None else ROUNDING[narrow] / 10):
        warnings.warn(
            f"Two gradients of the same loss on the same data differ by {difference / length:.1e} of their length, "
            "so rows may fall below the noise floor. Usual causes: loss_fn draws random numbers from a generator of "
            "its own, reads the next batch, or depends on state that changes from call to call. Measuring advances "
            "such state, which then alters the run.",
            SmoothdiagWarning,
        )
        return test, once
    if training is None:
        return test, once
    angle, ratio = compare(training, once.gradient)
    plain = not any(map(vectors.is_sharded, training))
    reproduced = plain and all(torch.equal(a, b) for a, b in zip(training, once.gradient, strict=True))
    return replace(test, angle=angle, ratio=ratio, reproduced=reproduced), once


def rounding(dtype: torch.dtype) -> float:
    """Returns the relative error that rounding leaves in one gradient with parameters of this dtype."""
    return ROUNDING.get(dtype, ROUNDING[torch.bfloat16])


def dtypes_of(loss: Tensor) -> set[torch.dtype]:
    """Returns the dtypes that the loss was computed in, as far as its graph shows them.

    Autocast regions within ``loss_fn`` leave nothing else to be seen from outside.
    """
    found: set[torch.dtype] = set()
    for node in nodes_of(loss):
        found.update(result.dtype for result in getattr(node, "_input_metadata", ()))
        if type(node).__name__.startswith("CompiledFunction"):  # a whole graph in one node
            found.update(tensor.dtype for tensor in node.saved_tensors if tensor is not None)
    return found


def _narrowest(dtypes: set[torch.dtype]) -> torch.dtype | None:
    return max(UNIT_ROUNDOFF.keys() & dtypes, key=lambda dtype: UNIT_ROUNDOFF[dtype], default=None)


def _rounding_error(objective: Objective, start: Vector, once: Evaluation, narrow: torch.dtype) -> float:
    """Returns the relative error of a gradient that is computed with parameters rounded to ``narrow``.

    Parameters that are moved by about half of their rounding are rounded anew, and so is all that follows from them;
    the move itself is hardly longer than the rounding that is inherent.
    """
    start = [vectors.widened(x) for x in start]
    moves = [x * draw for x, draw in zip(start, vectors.random_like(start, seed=0), strict=True)]
    there = objective.evaluate(vectors.add_scaled(start, moves, UNIT_ROUNDOFF[narrow] / 2))
    error = _norm(vectors.sub(there.gradient, once.gradient)) / math.sqrt(2) / _norm(once.gradient)
    return error if math.isfinite(error) else 0.0


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


def _norm(a: Vector) -> float:
    return float(vectors.norm(a))

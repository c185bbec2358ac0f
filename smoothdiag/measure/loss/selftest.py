"""Self-test: do two evaluations give the same gradient, and is it the gradient of the training loop?"""

import math
import warnings
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from smoothdiag import collectives, vectors
from smoothdiag.measure.loss.coordinates import forward_dtypes
from smoothdiag.measure.loss.graph import nodes_of
from smoothdiag.measure.loss.objective import Evaluation, Objective, Reduction
from smoothdiag.rows import SmoothdiagWarning
from smoothdiag.tally import Tally
from smoothdiag.vectors import Vector

ROUNDING = {torch.float64: 2e-15, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Relative rounding error of one gradient by parameter dtype, rounded up from what small LSTMs, attention and
convolutional networks show against the next wider dtype (benchmarks/gradient_rounding.py; float64 and float16
scaled from float32 and bfloat16 by their unit roundoff)."""

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Relative distance over which a narrow dtype rounds a number to its neighbour."""

LOSS_SCALE = 2.0**16
"""Scale of the loss if part of the model computes in float16: the first scale of a GradScaler."""

SLACK = 1e-3
"""Relative difference of replayed and training gradient, beyond ten times the rounding, that counts as none: additions
in another order, and kernels that a device chooses anew, explain that much."""

EXACT_SLACK = 1e-4
"""As ``SLACK``, if the two gradients were equal bit for bit at the self-test."""

RETEST_EVERY = 10
"""Measurements between two estimates of rounding, if part of the loss is computed in a narrow dtype."""


class Doubt(Enum):
    """Why the measured loss may not be the trained one; each value says what to look for."""

    DIRECTION = (
        "The gradient of loss_fn points in another direction than the gradient of the training loop, so the probe "
        "measures another loss than the one you train, and marks its rows `not_reproduced`. Usual causes: part of the "
        "loss, an autocast region or augmentation outside loss_fn; state of the loop that loss_fn reads and that has "
        "changed since, such as a hidden state; random numbers drawn between watch or observe and the forward pass; "
        "batches that the probe did not see. Move everything that changes the loss into loss_fn."
    )
    LENGTH = (
        "The gradient that backward left is {ratio:.3g} times as long as the gradient of loss_fn and has the same "
        "direction: the loop trains a multiple of the loss that the probe measures. Gradient norms, L0 and thresholds "
        "are wrong by this factor. Usual causes: a sum over the batch instead of a mean; a factor that only the loop "
        "applies, for example for a loss scale or for accumulation; micro-batches that do not add up as `reduction` "
        "says. Let loss_fn return the tensor that the loop calls backward on."
    )
    REDUCTION = (
        "The gradient that backward left is {ratio:.3g} times the gradient measured from {number} micro-batches: the "
        "loop does not add micro-batches up as the probe does, so the probe measures a multiple of the loss you train. "
        'Pass reduction="{reduction}" to the Probe. If the loop divides the gradients after the last micro-batch and '
        "clips them after that, the measured values are already right: divide each loss instead of the gradients to "
        "end this warning."
    )


@dataclass(frozen=True)
class SelfTest:
    """What the first measured step showed about the loss.

    Attributes:
        gradient_error: Relative error of one gradient evaluation, from rounding and from repeating the evaluation.
        angle: Angle between the replayed gradient and the training gradient [rad]; NaN if there was none to compare.
        ratio: Length of the training gradient over the length of the replayed gradient.
        reproduced: Whether the two gradients are equal bit for bit.
        narrow: Dtype that part of the loss is computed in, if it is narrower than the gradient's, as under autocast.
        loss_scale: Scale of the loss to take gradients with.
        frozen: Dtype that parameters outside x have in training but not in measurements, if it is narrower than the
            gradient's.
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
        scale: float = 1.0,
    ) -> tuple[Doubt, str] | None:
        """Returns why two gradients belong to different losses; ``None`` if rounding explains their difference.

        Args:
            training: The gradient of the loop.
            replayed: The gradient of ``loss_fn``.
            has_length: Whether to compare lengths too; not if the training gradient may be clipped or scaled.
            num_micro_batches: Number of micro-batches in the loss.
            reduction: How the probe adds their losses up.
            arrived: Length of the gradient that the optimizer got, if it differs from ``training``; NaN if it does not,
                or if it is not known.
            scale: What ``training`` has been multiplied by since backward.
        """
        dtypes = {g.dtype for g in training} | ({self.frozen} if self.frozen else set())
        coarsest = max(self.gradient_error, *map(rounding, dtypes))
        tolerance = 10 * coarsest + (EXACT_SLACK if self.reproduced else SLACK)
        angle, ratio, length = compare(training, replayed)
        ratio /= scale
        if angle > tolerance:
            return Doubt.DIRECTION, Doubt.DIRECTION.value
        if not has_length and abs(arrived - length) <= tolerance * length:
            return None  # a loop may sum up losses and divide the gradient at the end
        other, factor = ("sum", num_micro_batches) if reduction == "mean" else ("mean", 1 / num_micro_batches)
        if num_micro_batches > 1 and abs(ratio / factor - 1) < SLACK:
            said = Doubt.REDUCTION.value.format(ratio=ratio, number=num_micro_batches, reduction=other)
            return Doubt.REDUCTION, said
        if has_length and abs(ratio - 1) > tolerance:
            return Doubt.LENGTH, Doubt.LENGTH.value.format(ratio=ratio)
        return None


def self_test(objective: Objective, start: Vector, training: Vector | None) -> tuple[SelfTest, Evaluation]:
    """Returns the findings at ``start`` and the evaluation there; warns if gradients do not repeat.

    Args:
        objective: The loss on the data of the first measured step.
        start: The parameters before that step.
        training: The gradient of the training loop; ``None`` if it is not known.
    """
    dtypes = set[torch.dtype]()
    once = objective.evaluate(start, lambda loss: dtypes.update(dtypes_of(loss)))
    if torch.float16 in dtypes and objective.loss_scale == 1:
        objective.loss_scale = LOSS_SCALE
        once = objective.evaluate(start)

    def compare_again(tally: Tally, k: int, found: list[Tensor]) -> None:
        first, second = tally.packing.piece(k, once.gradient), tally.packing.pieces[k].of(found)
        tally.squares(
            k, ["length", "apart"], lambda a, b: [vectors.wide(a), vectors.wide(a) - vectors.wide(b)], first, second
        )

    again = objective.sweep(start, compare_again)
    length, difference = (math.sqrt(again.total(name)) for name in ("length", "apart"))
    # The difference of two gradients contains the error of both.
    repeat = difference / math.sqrt(2) / length if length and math.isfinite(difference) else 0.0
    # The coarsest dtype decides: its rounding is the largest.
    coarsest = max(rounding(g.dtype) for g in once.gradient)
    narrow = _narrowest((dtypes | forward_dtypes(objective.model)) - {g.dtype for g in once.gradient})
    error = max(coarsest, repeat)
    if narrow is not None and length:
        error = max(error, _rounding_error(objective, start, once, narrow))
    # A bfloat16 base under float32 adapters is widened for the measurement: training was rounded, this is not.
    frozen = _narrowest(objective.widened_dtypes)
    test = SelfTest(error, narrow=narrow, loss_scale=objective.loss_scale, frozen=frozen)
    # More than the order of additions on a GPU explains.
    if repeat > max(100 * coarsest, 0.0 if narrow is None else ROUNDING[narrow] / 10):
        warnings.warn(
            f"Two gradients of the same loss on the same data differ by {difference / length:.1e} of their length, "
            "so loss_fn does not repeat itself. Rows may fall below the noise floor, and measuring may alter the run, "
            "because each extra call of loss_fn advances whatever changes between calls. Usual causes: loss_fn draws "
            "random numbers from a generator of its own, reads the next batch, or depends on state that changes from "
            "call to call. Let loss_fn depend on the model and the batch alone.",
            SmoothdiagWarning,
        )
        return test, once
    if training is None:
        return test, once
    angle, ratio, _ = compare(training, once.gradient)
    plain = not any(map(vectors.is_sharded, training))
    reproduced = plain and all(torch.equal(a, b) for a, b in zip(training, once.gradient, strict=True))
    return replace(test, angle=angle, ratio=ratio, reproduced=reproduced), once


def rounding(dtype: torch.dtype) -> float:
    """Returns the relative error that rounding leaves in one gradient with parameters of this dtype."""
    return ROUNDING.get(dtype, ROUNDING[torch.bfloat16])


def dtypes_of(loss: Tensor) -> set[torch.dtype]:
    """Returns the dtypes that the loss was computed in, as far as its graph shows them.

    Autocast regions inside ``loss_fn`` leave no other trace that is visible from outside.
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

    Parameters that move by about half of their rounding are rounded differently, and so is everything computed from
    them; the move itself is hardly longer than the rounding that is there anyway.
    """
    start = [vectors.widened(x) for x in start]
    moves = [x * draw for x, draw in zip(start, vectors.random_like(start, seed=0), strict=True)]
    there = objective.evaluate(vectors.add_scaled(start, moves, UNIT_ROUNDOFF[narrow] / 2))
    error = _norm(vectors.sub(there.gradient, once.gradient)) / math.sqrt(2) / _norm(once.gradient)
    return error if math.isfinite(error) else 0.0


def compare(training: Vector, replayed: Vector) -> tuple[float, float, float]:
    """Returns the angle [rad] of the training gradient to the replayed one, their lengths' ratio, the latter's length.

    Angle and ratio are NaN if one gradient is zero or not finite.
    """
    size, length = map(float, collectives.read([vectors.norm(a).reshape(1) for a in (training, replayed)], {}))
    if not (size and length and math.isfinite(size) and math.isfinite(length)):
        return math.nan, math.nan, length
    # The arc sine of half the chord between unit vectors keeps the digits; an arc cosine loses half of them.
    chord = float(vectors.distance(training, replayed, over=(size, length)))
    return 2 * math.asin(min(1.0, chord / 2)), size / length, length


def _norm(a: Vector) -> float:
    return float(vectors.norm(a))

"""Rows: the measurements in a trace that say how long a step may be, and a check of whether something else clips."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from smoothdiag import vectors
from smoothdiag.autoclip.rates import Number
from smoothdiag.geometry import Euclidean
from smoothdiag.measure.estimators import Estimate, Estimator, LocalSmoothness, Step
from smoothdiag.measure.estimators.base import Contradicted
from smoothdiag.measure.estimators.halves import on_halves
from smoothdiag.measure.estimators.secants import OFF
from smoothdiag.measure.loss.faults import NotPutBack
from smoothdiag.measure.loss.selftest import SLACK, SelfTest
from smoothdiag.measure.probe import Probe
from smoothdiag.rows import CLIP_SUFFIX, USABLE_STATUSES, SmoothdiagWarning

RADIUS = 1e-2
"""Radius relative to ||x||, about as long as the steps it is measured for. Over a thousandth and less the kinks of
ReLU layers shorten the lengths of a residual network five times."""

ALONG_GRADIENT = LocalSmoothness(radius=RADIUS, two_scale=False)


@dataclass
class ForClipping:
    """An estimator that writes rows for AutoClip, under a name that no estimator of the probe has.

    Attributes:
        estimator: The estimator that measures.
        wants_signal: Says whether the signal share of the gradient is measured now, too.
        state: Returns what AutoClip holds now, as further columns of its rows: so a trace tells how it clipped.
        halves: Whether the data can be halved, and the loss evaluated on a half, as far as is known.
        is_mean: Whether the gradient is the mean of those on halves, as far as is known. It is not with normalisation
            over the batch, or with dropout.
    """

    estimator: Estimator
    wants_signal: Callable[[], bool] = lambda: False
    state: Callable[[], Mapping[str, float | str]] = dict
    halves: bool = True
    is_mean: bool = True

    @property
    def checks_start(self) -> bool | None:
        """Whether the estimate checks the training gradient that may stand in for one to evaluate."""
        is_euclidean = isinstance(self.estimator, LocalSmoothness) and type(self.estimator.geometry) is Euclidean
        return is_euclidean and self.halves and self.is_mean and self.wants_signal()

    def __call__(self, step: Step) -> Estimate:
        """Returns the estimate for all parameters, with a suffix to its name; the column ``signal`` comes with it.

        Raises:
            Contradicted: If the training gradient stands in for one to evaluate, and is not that of two halves.
        """
        estimate = self.estimator(step)
        found: dict[str, float | str] = dict(estimate.extra)
        is_checked = False
        if self.halves and self.wants_signal() and estimate.status.usable:
            replicas = step.objective.replicas
            replicas.meet()
            try:
                with replicas.in_step():  # if one rank cannot evaluate a half, all ranks go on without
                    signal, residue = signal_of(step)
                    # A saturated change is many times the gradient itself, which the row holds too.
                    is_checked = residue <= OFF * min(estimate.smoothness * estimate.step_norm, estimate.grad_norm)
                    found |= signal
            except NotPutBack:
                raise
            except Exception:  # a loss may want batches of one size; lengths are measured without the signal
                self.halves = False
        if step.training is not None and not is_checked:
            self.is_mean = False  # to find that out again at every step would cost more than it saves
            raise Contradicted
        found |= self.state()
        return replace(estimate, estimator=estimate.estimator + CLIP_SUFFIX, parts=(), extra=found)


def signal_of(step: Step) -> tuple[dict[str, float], float]:
    """Returns the share of ||g||^2 that two halves of the data have in common, in [-1, 1], as a column of a row.

    <g_A, g_B> of independent halves estimates the squared norm of the expected gradient without bias; ||g||^2 is that
    of their mean. Without a gradient there is no column. It costs two gradients on half of the data. The second value
    is how far the mean of the halves is from the training gradient [f/x]; NaN if that stands in for nothing.

    Raises:
        ValueError: If the data cannot be halved.
    """
    a, b = (half.gradient for half in on_halves(step, step.start))
    sums = [vectors.dot(a, b), vectors.norm(a).square(), vectors.norm(b).square()]
    if step.training is not None:
        mean = torch._foreach_lerp(list(a), list(b), 0.5)
        sums.append(vectors.norm(vectors.sub(mean, step.training)))
    common, *squares = torch.stack(sums).tolist()  # one wait for the device
    residue = squares.pop() if step.training is not None else math.nan
    squared = (sum(squares) + 2 * common) / 4
    return {"signal": max(-1.0, min(1.0, common / squared))} if 0 < squared < math.inf else {}, residue


class Rows:
    """Reads every row for AutoClip once.

    Args:
        probe: The probe.

    Attributes:
        last: Step of the last row that was read, or -1.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self.last = -1
        self._begin = self._num_read = len(probe.trace)  # earlier rows are of another run, or of steps without AutoClip

    def new(self) -> list[dict[str, Any]]:
        """Returns the rows that are new since the last call."""
        trace = self._probe.trace
        begin, self._num_read = min(self._num_read, len(trace)), len(trace)
        rows = (trace[i] for i in range(begin, len(trace)))
        # A trace that goes on after a checkpoint begins with rows that were read before.
        found = [row for row in rows if _is_ours(row["estimator"]) and row["step"] > self.last]
        if found:
            self.last = found[-1]["step"]
        return found

    def all(self) -> list[dict[str, Any]]:
        """Returns all rows of this run."""
        trace = self._probe.trace
        return [trace[i] for i in range(self._begin, len(trace)) if _is_ours(trace[i]["estimator"])]

    @staticmethod
    def measured(row: Mapping[str, Any]) -> tuple[float, float] | str:
        """Returns the step to the lowest point of a quadratic with the measured curvature, and the rate of that step.

        If there is no such step, it returns the reason instead. Units: [x], [x^2/f].
        """
        curvature = row["smoothness"]
        if row["status"] not in USABLE_STATUSES:
            return str(row["status"])
        if not 0 < curvature < math.inf:
            return "without positive curvature"
        # A row with a slope is about one direction, along which the curvature may have either sign.
        has_slope = "slope" in row
        length = (-float(row["slope"]) if has_slope else row["grad_norm"]) / curvature
        if not 0 < length < math.inf:
            return "without a descent"
        return length, math.nan if has_slope else 1 / curvature


class Arrivals:
    """Compares the gradient that reaches AutoClip with its measurement. If it is shorter, something has clipped it.

    Args:
        probe: The probe; ``None`` if its rows do not hold the Euclidean norm.
        acts: Whether AutoClip changes anything.

    Attributes:
        acts: Whether AutoClip changes anything.
        clipped_at: Step whose gradient was shorter than measured, or -1.
    """

    def __init__(self, probe: Probe | None, *, acts: bool) -> None:
        self._probe, self.acts = probe, acts
        self.clipped_at = -1
        self._step = -1
        self._norm: Number | None = None

    def take(self, step: int, norm: Number | None) -> None:
        """Keeps the gradient norm of a step that will be measured."""
        self._step, self._norm = step, norm

    def check(self, row: Mapping[str, Any]) -> None:
        """Warns, once, if a gradient was shorter than its measurement by more than rounding."""
        if self._probe is None or self._norm is None or row["step"] != self._step or row.get("data") != "step":
            return
        error = _error(self._probe.self_test)
        arrived, measured = float(self._norm), row["grad_norm"]
        if arrived < measured * (1 - 10 * SLACK - 10 * error):
            self._probe, self.clipped_at = None, self._step
            advice = (
                "Let AutoClip clip alone: remove clip_grad_norm_ from the loop, and the trainer's setting that calls "
                "it. If nothing else clips, give loss_fn the same scale as the loss that is trained."
            )
            warnings.warn(
                f"The gradient that reached AutoClip at step {self._step} had the norm {arrived:.3g}, but the probe "
                f"measured {measured:.3g}. Something else seems to clip first, so that AutoClip cannot see long "
                f"gradients, and clip_fraction is too low. {advice if self.acts else 'The longest step is right.'}",
                SmoothdiagWarning,
            )


def _error(test: SelfTest | None) -> float:
    """Returns the relative error of a measured gradient norm beside that of the loop.

    A gradient computed in a narrow dtype may be mostly rounding, but the measurement repeats this rounding. So the
    distance that the self-test has seen between the two counts, if there is one.
    """
    if test is None:
        return math.inf
    return test.angle if math.isfinite(test.angle) else test.gradient_error


def _is_ours(estimator: str) -> bool:
    # A measurement that failed has the name of the class, or of the probe.
    return estimator.endswith(CLIP_SUFFIX) or estimator in (ForClipping.__name__, "probe")

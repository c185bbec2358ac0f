"""CriticalStep: the learning rate at which the step would have stopped lowering the loss, by forward passes alone."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from smoothdiag import arguments, vectors
from smoothdiag.measure.estimators.base import Estimate, Status, Step

SMALLEST, LARGEST = 1e-3, 1e6
"""Smallest and largest multiple of the step at which the search looks for a crossing."""

NEAR, FAR = 4.0, 32.0
"""Factor from the first value to the second in a cold start, and largest factor to a further value before the crossing
is bracketed. These took the fewest values on small convolutional, attention and LSTM networks, whose crossings lay at
8 to 700 steps."""

MOST_SHORT, SLOW = 5, 0.7
"""Number of predictions from one side of the crossing before every further one takes the factor FAR; and the share of
its width, on a log scale, above which a bracket counts as hardly narrowed. After one such value, or two if the ends of
the bracket are less than a factor NEAR apart, the bracket is bisected."""

OFFSET = 0.3
"""How far below the predicted crossing to evaluate, in units of ``rtol``: at the crossing rounding decides the sign."""

LOSS_ULPS, LOSS_PER_GRADIENT = 4, 1 / 30
"""Rounding error of one loss, in ulp of its value and as a share of a gradient's relative error. Small networks show
standard deviations of half an ulp, and with bfloat16 of 1/100 to 1/700 of the gradient's error (`test_critical.py`)."""


@dataclass(frozen=True)
class CriticalStep:
    """Critical learning rate: the smallest eta with f(x - eta u) > f(x), where the step taken was -lr u.

    2 / eta is a curvature measured from losses alone: u'Hu / g'u if the loss is quadratic along the step. For plain
    gradient descent this is g'Hg / ||g||^2, and for Adam without momentum the same quotient in the norm of the
    preconditioner. Momentum that sums gradients makes u about 1/(1 - momentum) gradients long, and the value larger by
    that factor.

    The search evaluates the loss at multiples of the step. It predicts the crossing by the parabola through the start
    and two multiples, and brackets it on a log scale until every rate in the bracket is within ``rtol`` of the
    reported one. It begins at the critical rate of the last measured step, or at the step itself. It reuses loss and
    gradient at the start if another estimator has evaluated them; otherwise ``grad_norm`` is NaN.

    Muon and sign methods take steps of a fixed length lr in a norm of their own. For them too the loss falls iff lr is
    below the critical rate, which is 2 g'u / u'Hu if the loss is quadratic along the step; along the steepest direction
    g'u is the dual norm of g. There is no limit of curvature alone: such steps never grow, and the gradient shrinks
    until they are too long.

    If the loss rises, falls and rises again, the row reports the first crossing that the search met.

    The step lowers the loss of the batch that it was taken on, and hardly that of another one. A probe therefore
    measures this estimator on the step's own batch, also if ``data="fixed"``, unless it has ``probe_batches``. Other
    estimators evaluate a gradient on that batch with ``data="step"``.

    Args:
        rtol: Relative accuracy of the rate, in (0, 0.5].
        max_values: Largest number of forward passes, including the one at the start.

    Raises:
        ValueError: If an argument is out of its range.

    Units: smoothness = 2 / critical_lr [f/x^2]; step_norm [x] is the distance to the crossing; extra columns are
    ``critical_lr`` [x^2/f], ``critical_multiple`` of the step taken, and ``num_values``, the forward passes used. If
    parameter groups have different rates, only the multiple is known.

    Source: Kalra et al. 2026, critical sharpness, which they find by doubling and halving.

    Examples:
        Gradient descent on 2 x^2 with the rate 0.1 goes from x = 1 to x = 0.6; from the rate 2 / 4 on the loss rises:

        >>> model = sd.problems.quadratic([4.0]).as_module(torch.ones(1))
        >>> loss = sd.objective(model, lambda model, batch: model(), [None])
        >>> found = sd.CriticalStep()(sd.Step(0, loss, start=loss.point(), end=[torch.tensor([0.6])], lr=0.1))
        >>> print(round(found.smoothness, 1), round(found.extra["critical_lr"], 2))
        4.0 0.5
    """

    of_step: ClassVar[bool] = True

    rtol: float = 0.06
    max_values: int = 16

    def __post_init__(self) -> None:
        arguments.number("rtol", self.rtol, "in (0, 0.5]", lambda v: 0 < v <= 0.5)
        arguments.whole("max_values", self.max_values, 3)

    def __call__(self, step: Step) -> Estimate:
        """Returns the estimate."""
        length = float(vectors.norm(vectors.sub(step.end, step.start)))
        is_known = "at_start" in step.__dict__ or step.known_start is not None
        loss = step.at_start.loss if is_known else step.objective.value(step.start)
        grad_norm = step.norms_of_gradient()["", "all"] if is_known else math.nan
        num_values = 0 if is_known else 1
        empty = Estimate("critical_step", math.nan, grad_norm, math.nan, loss, extra=_columns(num_values))
        if not (math.isfinite(loss) and math.isfinite(length)):
            return replace(empty, status=Status.NON_FINITE)
        if length == 0:
            return replace(empty, step_norm=0.0, status=Status.ZERO_STEP)

        ray = _Ray(self.rtol, _slope(step, grad_norm * length) if is_known else math.nan)
        scale = step.lr if 0 < step.lr < math.inf else 1.0
        multiple, status = self._first(step, ray, scale)
        while status is None and num_values < self.max_values:
            there = step.objective.value(_point(step, multiple))
            num_values += 1
            ray.add(multiple, there - loss, _rounding(step) * max(abs(loss), abs(there)))
            if ray.is_narrow:
                status = Status.OK
                break
            multiple, status = ray.propose()
        status = Status.NOT_CONVERGED if status is None else status
        crossing = ray.crossing() if status in (Status.OK, Status.NOT_CONVERGED) else math.nan
        if math.isnan(crossing):
            return replace(empty, status=status, extra=_columns(num_values))
        step.memory[self] = crossing * scale
        rate = crossing * step.lr if step.lr > 0 else math.nan
        extra = _columns(num_values, rate, crossing)
        return replace(empty, smoothness=2 / rate, step_norm=crossing * length, status=status, extra=extra)

    def _first(self, step: Step, ray: "_Ray", scale: float) -> tuple[float, Status | None]:
        """Returns the first multiple to try, or why there is none."""
        if ray.slope > 0:
            return math.nan, Status.NO_DESCENT
        if self not in step.memory:
            return 1.0, None
        ray.growth = ray.widest  # the crossing cannot be far from the last one
        return min(max(step.memory[self] / scale, SMALLEST), LARGEST), None


@dataclass
class _Ray:
    """The known changes of the loss, phi(m) = f(x + m d) - f(x), at multiples m of the step d.

    The crossing is where phi(m)/m is zero; phi(m)/m is a straight line in m if the loss is a parabola.

    Attributes:
        rtol: Relative accuracy wanted.
        slope: phi(m)/m at m = 0, the slope of the loss along d; NaN if it is not known.
        growth: Factor from the first multiple to the second.
        slopes: phi(m)/m by multiple, if it is larger than rounding; inf if the loss is not finite.
        unclear: Multiples whose phi is within rounding.
        width: Logarithm of the ratio of the ends of the last bracket.
        num_slow: Number of successive values that have hardly narrowed the bracket.
        num_short: Number of predictions so far from one side of the crossing alone.
    """

    rtol: float
    slope: float = math.nan
    growth: float = NEAR
    slopes: dict[float, float] = field(default_factory=dict)
    unclear: list[float] = field(default_factory=list)
    width: float = math.inf
    num_slow: int = 0
    num_short: int = 0

    @property
    def risen(self) -> float:
        """The smallest multiple at which the loss has risen; inf if there is none."""
        return min((m for m, slope in self.slopes.items() if slope > 0), default=math.inf)

    @property
    def fallen(self) -> float:
        """The largest multiple below ``risen`` at which the loss has fallen; 0 if there is none."""
        return max((m for m, slope in self.slopes.items() if slope < 0 and m < self.risen), default=0.0)

    @property
    def is_narrow(self) -> bool:
        """Whether one multiple is within ``rtol`` of every multiple in the bracket."""
        return self.risen * (1 - self.rtol) <= self.fallen * (1 + self.rtol)

    @property
    def widest(self) -> float:
        """The ratio of the ends of a bracket that is just narrow enough, with a margin for rounding."""
        return (1 + 0.98 * self.rtol) / (1 - 0.98 * self.rtol)

    def add(self, multiple: float, change: float, noise: float) -> None:
        """Notes the change of the loss at a multiple; a loss of inf or NaN counts as risen."""
        if not math.isfinite(change):
            self.slopes[multiple] = -math.inf if change == -math.inf else math.inf
        elif abs(change) <= noise:
            self.unclear.append(multiple)
        else:
            self.slopes[multiple] = change / multiple

    def crossing(self) -> float:
        """Returns the predicted crossing, within ``rtol`` of the ends of a narrow bracket; NaN without a bracket."""
        if not 0 < self.fallen < self.risen < math.inf:
            return math.nan
        predicted = self._predicted()
        if math.isnan(predicted):
            predicted = math.sqrt(self.fallen * self.risen)
        if self.is_narrow:
            predicted = min(max(predicted, self.risen * (1 - self.rtol)), self.fallen * (1 + self.rtol))
        return predicted

    def propose(self) -> tuple[float, Status | None]:
        """Returns the multiple to try next, or why there is none."""
        target, inner = self._target(), 0.98 * self.rtol
        if target <= self.fallen * (1 + inner):  # the next value will close the bracket
            multiple = min(target, self.fallen * (1 + inner)) / (1 - inner)
        elif target >= self.risen * (1 - inner):
            multiple = max(target, self.risen * (1 - inner)) / (1 + inner)
        else:
            multiple = target * (1 - OFFSET * self.rtol)
        if near := [m for m in self.unclear if abs(math.log(multiple / m)) < self.rtol / 2]:
            # The crossing is here, up to rounding: only values on both sides of it can tell.
            around = [m for m in (near[0] / (1 - inner), near[0] / (1 + inner)) if self.fallen < m < self.risen]
            multiple = next((m for m in around if m not in self.unclear), math.nan)
        if math.isnan(multiple):
            return multiple, Status.BELOW_NOISE_FLOOR
        if multiple > LARGEST and max(self.fallen, *self.unclear, 0.0) >= LARGEST:
            return math.nan, Status.NO_CROSSING if self.slopes else Status.BELOW_NOISE_FLOOR
        if multiple < SMALLEST and self.risen <= SMALLEST:
            return math.nan, Status.NO_DESCENT
        return min(max(multiple, SMALLEST), LARGEST), None

    def _target(self) -> float:
        """Returns where the crossing is expected, not too far from the known multiples."""
        fallen, risen, predicted = self.fallen, self.risen, self._predicted()
        if 0 < fallen < risen < math.inf:
            before, self.width = self.width, math.log(risen / fallen)
            self.num_slow = self.num_slow + 1 if self.width > SLOW * before else 0
            # In a moderate bracket one value just below the crossing is not slow yet: the next may lie just above.
            if self.num_slow > (risen < NEAR * fallen) or math.isnan(predicted):
                self.num_slow = 0
                return math.sqrt(fallen * risen)
            return predicted
        hidden = max((m for m in self.unclear if fallen < m < risen), default=0.0)
        is_second = len(self.slopes) + len(self.unclear) == 1
        self.num_short += not math.isnan(predicted)
        least = FAR if self.num_short > MOST_SHORT else 1.0
        if risen == math.inf:
            last = max(fallen, hidden)
            if not math.isnan(predicted):
                return min(max(predicted, last * least), last * FAR)
            if is_second:
                return last * self.growth if fallen else last if self.growth < NEAR else last * FAR
            return last * (NEAR if last == fallen else FAR)
        if not math.isnan(predicted):
            return max(min(predicted, risen / least), risen / FAR)
        if hidden:
            return math.sqrt(hidden * risen) if risen > hidden * self.widest else hidden
        return risen / (self.growth if is_second else FAR)

    def _predicted(self) -> float:
        """Returns where the line through the nearest two slopes is zero; NaN if that lies outside the bracket."""
        known = sorted((m, s) for m, s in {0.0: self.slope, **self.slopes}.items() if math.isfinite(s))
        below = [point for point in known if point[0] <= self.fallen]
        above = [point for point in known if point[0] >= self.risen]
        pair = [below[-1], above[0]] if below and above else below[-2:] or above[:2]
        if len(pair) < 2 or pair[0][1] == pair[1][1]:
            return math.nan
        (m, here), (n, there) = pair
        zero = m - here * (n - m) / (there - here)
        return zero if self.fallen < zero < self.risen else math.nan


def _point(step: Step, multiple: float) -> vectors.Vector:
    if multiple == 1:
        return step.end
    # The displacement is computed anew for each point, so that it takes no memory while the loss is evaluated.
    return vectors.add_scaled(step.start, vectors.sub(step.end, step.start), multiple)


def _slope(step: Step, steepest: float) -> float:
    """Returns the slope of the loss along the step; NaN if it is within the error of the gradient."""
    slope = float(vectors.dot(step.at_start.gradient, vectors.sub(step.end, step.start)))
    return slope if abs(slope) > step.gradient_error * steepest else math.nan


def _rounding(step: Step) -> float:
    """Returns the relative error that a loss may have."""
    coarsest = max(torch.finfo(x.dtype).eps for x in step.start)
    return max(LOSS_ULPS * coarsest, LOSS_PER_GRADIENT * step.gradient_error)


def _columns(num_values: int, rate: float = math.nan, multiple: float = math.nan) -> dict[str, float]:
    return {"critical_lr": rate, "critical_multiple": multiple, "num_values": num_values}

"""CriticalStep: the learning rate at which the step would have stopped lowering the loss, by forward passes alone."""

import math
from dataclasses import dataclass, field, replace

import torch

from smoothdiag import arguments, vectors
from smoothdiag.measure.estimators.base import Estimate, Status, Step

SMALLEST, LARGEST = 1e-3, 1e6
"""Multiples of the step between which a crossing is looked for."""

NEAR, FAR = 4.0, 32.0
"""Factors to the second value from cold, and at most to a further one while the crossing is not bracketed: what
takes the fewest values on small convolutional, attention and LSTM networks, whose crossings lay at 8 to 700 steps."""

MOST_SHORT, SLOW = 5, 0.7
"""Predictions from one side of the crossing before each step takes the factor FAR; and the share of its width, on a
log scale, above which a bracket has hardly narrowed: after one such value, or two if its ends are less than NEAR apart,
it is bisected."""

OFFSET = 0.3
"""How far, in units of ``rtol``, values are taken below the predicted crossing: right at it their sign is rounding."""

LOSS_ULPS, LOSS_PER_GRADIENT = 4, 1 / 30
"""Rounding of one loss: in ulp of its value, and by the relative error of a gradient. Small networks show standard
deviations of half an ulp, and with bfloat16 of 1/100 to 1/700 of the error (`test_critical.py`)."""


@dataclass(frozen=True)
class CriticalStep:
    """Critical learning rate: the smallest eta with f(x - eta u) > f(x), where the step taken was -lr u.

    Two over it is a curvature, read off losses: u'Hu / g'u if the loss is quadratic along the step. For plain gradient
    descent that is g'Hg / ||g||^2; for Adam without momentum the same quotient in the norm of its preconditioner; for
    momentum as a sum, u is about 1/(1 - momentum) gradients long and the value larger by as much.

    Losses are evaluated at multiples of the step: predicted by the parabola through the start and two of them, and
    bracketed on a log scale, until every rate in the bracket is within ``rtol`` of the one reported. The search
    begins at the critical rate of the last measured step, or at the step itself. The loss at the start, and the
    gradient too, are reused where another estimator has asked for them; without them ``grad_norm`` is NaN.

    Where the loss rises, falls and rises again, it is the first crossing that the search met.

    Args:
        rtol: Relative accuracy of the rate, in (0, 0.5].
        max_values: Forward passes at most, the one at the start included.

    Raises:
        ValueError: If an argument is out of its range.

    Units: smoothness = 2 / critical_lr [f/x^2], step_norm [x] the distance to the crossing; extra columns
    ``critical_lr`` [x^2/f], ``critical_multiple`` of the step taken, ``num_values`` forward passes used. Where
    parameter groups differ in their rates only the multiple is known.

    Source: Kalra et al. 2026, critical sharpness; there by doubling and halving.

    Examples:
        Gradient descent on 2 x^2 with the rate 0.1 goes from x = 1 to x = 0.6; from the rate 2 / 4 on the loss rises:

        >>> model = sd.problems.quadratic([4.0]).as_module(torch.ones(1))
        >>> loss = sd.objective(model, lambda model, batch: model(), [None])
        >>> found = sd.CriticalStep()(sd.Step(0, loss, start=loss.point(), end=[torch.tensor([0.6])], lr=0.1))
        >>> print(round(found.smoothness, 1), round(found.extra["critical_lr"], 2))
        4.0 0.5
    """

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
        grad_norm = float(vectors.norm(step.at_start.gradient)) if is_known else math.nan
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
        ray.growth = ray.widest  # the crossing cannot be far
        return min(max(step.memory[self] / scale, SMALLEST), LARGEST), None


@dataclass
class _Ray:
    """What is known of the change of the loss, phi(m) = f(x + m d) - f(x), at multiples m of the step d.

    The crossing is where phi(m)/m is zero, a straight line in m where the loss is a parabola.

    Attributes:
        rtol: Relative accuracy wanted.
        slope: phi(m)/m at m = 0, the slope of the loss along d; NaN where it is not known.
        growth: Factor from the first multiple to the second.
        slopes: phi(m)/m by multiple, where its sign is beyond rounding; inf where the loss is not finite.
        unclear: Multiples with a phi within rounding.
        width: Logarithm of the ratio of the ends of the last bracket.
        num_slow: Values in a row that have hardly narrowed it.
        num_short: Predictions so far from one side of the crossing alone.
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
        """The smallest multiple at which the loss has risen; inf where there is none."""
        return min((m for m, slope in self.slopes.items() if slope > 0), default=math.inf)

    @property
    def fallen(self) -> float:
        """The largest multiple before it at which the loss has fallen; 0 where there is none."""
        return max((m for m, slope in self.slopes.items() if slope < 0 and m < self.risen), default=0.0)

    @property
    def is_narrow(self) -> bool:
        """Whether one multiple is within ``rtol`` of all in the bracket."""
        return self.risen * (1 - self.rtol) <= self.fallen * (1 + self.rtol)

    @property
    def widest(self) -> float:
        """The ratio of the ends of a bracket that is just narrow enough, but for rounding."""
        return (1 + 0.98 * self.rtol) / (1 - 0.98 * self.rtol)

    def add(self, multiple: float, change: float, noise: float) -> None:
        """Takes note of the change of the loss at a multiple; a loss of inf or NaN has risen."""
        if not math.isfinite(change):
            self.slopes[multiple] = -math.inf if change == -math.inf else math.inf
        elif abs(change) <= noise:
            self.unclear.append(multiple)
        else:
            self.slopes[multiple] = change / multiple

    def crossing(self) -> float:
        """Returns the crossing as predicted, but within ``rtol`` of the bracket's ends if it is narrow; NaN without."""
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
            # The crossing is here, but for rounding: only values on both sides of it can tell.
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
        """Returns where the crossing is thought to be, not too far from what is known."""
        fallen, risen, predicted = self.fallen, self.risen, self._predicted()
        if 0 < fallen < risen < math.inf:
            before, self.width = self.width, math.log(risen / fallen)
            self.num_slow = self.num_slow + 1 if self.width > SLOW * before else 0
            # In a bracket not too wide one value just below the crossing is no slowness: the next may be just above.
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
        """Returns where the line through the nearest two slopes is zero; NaN where that is not between the ends."""
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
    # The displacement is taken anew for each point, so that it takes no memory while the loss is evaluated.
    return vectors.add_scaled(step.start, vectors.sub(step.end, step.start), multiple)


def _slope(step: Step, steepest: float) -> float:
    """Returns the slope of the loss along the step; NaN where it is within the error of the gradient."""
    slope = float(vectors.dot(step.at_start.gradient, vectors.sub(step.end, step.start)))
    return slope if abs(slope) > step.gradient_error * steepest else math.nan


def _rounding(step: Step) -> float:
    """Returns the relative error that a loss may have."""
    coarsest = max(torch.finfo(x.dtype).eps for x in step.start)
    return max(LOSS_ULPS * coarsest, LOSS_PER_GRADIENT * step.gradient_error)


def _columns(num_values: int, rate: float = math.nan, multiple: float = math.nan) -> dict[str, float]:
    return {"critical_lr": rate, "critical_multiple": multiple, "num_values": num_values}

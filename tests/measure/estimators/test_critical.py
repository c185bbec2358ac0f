"""measure.estimators.critical: CriticalStep agrees with closed forms, a root finder and dense scans."""

import math
from dataclasses import replace

import networks
import numpy as np
import pytest
import torch
from losses import classification, regression
from regressions import small_run, step_over
from scipy.optimize import brentq
from steps import step_on

from smoothdiag import (
    ClippedMomentum,
    CriticalStep,
    LocalSmoothness,
    Objective,
    PathSmoothness,
    Probe,
    Status,
    Step,
    every,
    fit_smoothness,
    problems,
    vectors,
)
from smoothdiag.measure.estimators.critical import LOSS_PER_GRADIENT, LOSS_ULPS
from smoothdiag.measure.loss.batches import MicroBatch, RandomState
from smoothdiag.measure.loss.selftest import self_test

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.03),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.003, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.003, momentum=0.9, nesterov=True),
    "clipped": lambda p: ClippedMomentum(p, lr=0.03, threshold=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.003),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003),
}


def counted(step: Step) -> list[float]:
    """Makes the objective of a step note the losses it is asked for by forward passes."""
    values, value = [], step.objective.value

    def noting(point=None) -> float:
        values.append(value(point))
        return values[-1]

    step.objective.value = noting
    return values


def along(problem, x, d, *, lr=0.1, memory=None, **values) -> Step:
    """A step from x by d on a landscape."""
    base = step_on(problem, x, x + d, **values)
    return Step(0, base.objective, base.start, base.end, lr, **values, memory={} if memory is None else memory)


def crossing(problem, x, d) -> float:
    """The smallest multiple of d at which the loss is that of x, to 1e-12."""
    start = float(problem.value(x))

    def change(m: float) -> float:
        return float(problem.value(x + m * d)) - start

    scan = np.geomspace(1e-6, 1e6, 100)  # the landscapes are convex
    beyond = next(i for i, m in enumerate(scan) if not change(m) <= 0)
    return brentq(lambda m: min(change(m), 1e300), scan[beyond - 1], scan[beyond], xtol=1e-300, rtol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_on_a_quadratic_it_is_the_closed_form_for_any_optimizer(name, dim) -> None:
    curvatures = torch.logspace(-1, 1, dim, dtype=torch.float64)
    problem = problems.quadratic(curvatures.tolist())
    module = problem.as_module(torch.linspace(1.0, 2.0, dim, dtype=torch.float64))
    optimizer = OPTIMIZERS[name](module.parameters())
    for _ in range(6):
        x = module.x.detach().clone()
        optimizer.zero_grad()
        module().backward()
        optimizer.step()
        lr = optimizer.param_groups[0]["lr"]
        d = module.x.detach() - x
        u, g = -d / lr, curvatures * x
        estimate = CriticalStep()(along(problem, x, d, lr=lr))
        if float(g @ u) < 0:
            assert estimate.status is Status.NO_DESCENT
            continue
        assert estimate.status is Status.OK
        # any two values of a parabola tell where it crosses
        assert estimate.smoothness == pytest.approx(float(u @ (curvatures * u) / (g @ u)), rel=1e-6)
        assert estimate.extra["critical_lr"] == pytest.approx(2 / estimate.smoothness, rel=1e-12)
        assert estimate.extra["critical_multiple"] * lr == pytest.approx(estimate.extra["critical_lr"], rel=1e-12)
        assert estimate.step_norm == pytest.approx(estimate.extra["critical_multiple"] * float(d.norm()), rel=1e-9)
        assert estimate.loss == pytest.approx(float(problem.value(x)), rel=1e-12)
        assert math.isnan(estimate.grad_norm)


def test_for_gradient_descent_it_is_the_curvature_along_the_gradient() -> None:
    problem, x = problems.quadratic((3.0, 5.0, 0.5)), torch.tensor([0.3, -0.4, 0.5], dtype=torch.float64)
    g, h = problem.gradient(x), torch.tensor([3.0, 5.0, 0.5], dtype=torch.float64)
    estimate = CriticalStep()(along(problem, x, -0.1 * g))
    assert estimate.smoothness == pytest.approx(float(g @ (h * g) / (g @ g)), rel=1e-6)


@pytest.mark.parametrize("multiple", [0.05, 0.3, 0.8, 1.2, 6.0, 25.0])
def test_a_parabola_takes_five_values_and_three_where_the_start_is_known(multiple) -> None:
    problem, x = problems.quadratic((2.0,)), torch.tensor([1.0], dtype=torch.float64)
    step = along(problem, x, -2 * x / multiple)
    for num in (5, 3):
        estimate = CriticalStep()(Step(0, step.objective, step.start, step.end, 0.1, known_start=step.known_start))
        assert estimate.extra["critical_multiple"] == pytest.approx(multiple, rel=1e-6)
        assert estimate.extra["num_values"] == num
        step = replace(step, known_start=step.at_start)


def random_case(generator, landscape: str):
    """A point, a descent direction and a length of the step: landscapes, steepness and crossings of many sizes."""
    steepness = float(torch.randn((), generator=generator).exp())
    problem = {
        "quadratic": lambda: problems.quadratic(torch.randn(5, generator=generator).mul(1.5).exp().tolist()),
        "exponential": lambda: problems.exponential(1.0, steepness, dim=3),
        "cosh": lambda: problems.cosh(1.0, steepness, dim=3),
        "hybrid": lambda: problems.hybrid(1.0, steepness, dim=2),
        "power": lambda: problems.power(4.0, dim=3),
        "sum_cosh": lambda: problems.sum_cosh(4),
    }[landscape]()
    while True:
        x = 1.5 * torch.randn(problem.dim, generator=generator, dtype=torch.float64)
        g = problem.gradient(x)
        noise = torch.randn(problem.dim, generator=generator, dtype=torch.float64)
        d = -(g + 0.5 * g.norm() / noise.norm() * noise)
        if float(g @ d) < 0:
            # The step is between 1/40 of the critical one and a little longer than it.
            spread = float(torch.rand((), generator=generator))
            d = d * crossing(problem, x, d) / (0.7 * (40 / 0.7) ** spread)
            return problem, x, d


RANDOM = ["quadratic", "exponential", "cosh", "hybrid", "power", "sum_cosh"]


@pytest.mark.thorough
@pytest.mark.parametrize("landscape", RANDOM)
def test_it_is_within_its_tolerance_of_the_root_in_a_few_passes(landscape) -> None:
    generator = torch.Generator().manual_seed(0)
    errors, cold, known, warm = [], [], [], []
    for _ in range(40):
        problem, x, d = random_case(generator, landscape)
        truth = crossing(problem, x, d)
        step = along(problem, x, d)
        values = counted(step)
        estimate = CriticalStep()(step)
        assert estimate.status is Status.OK
        assert estimate.extra["num_values"] == len(values)
        cold.append(len(values))
        errors.append(abs(estimate.extra["critical_multiple"] / truth - 1))

        step = along(problem, x, d)
        step.at_start  # noqa: B018, another estimator has evaluated it
        values = counted(step)
        estimate = CriticalStep()(step)
        assert estimate.grad_norm == pytest.approx(float(problem.gradient(x).norm()), rel=1e-12)
        known.append(len(values))
        errors.append(abs(estimate.extra["critical_multiple"] / truth - 1))

        drift = math.exp(0.1 * float(torch.randn((), generator=generator)))
        step = along(problem, x, d, memory={CriticalStep(): drift * truth * step.lr})
        values = counted(step)
        estimate = CriticalStep()(step)
        assert step.memory[CriticalStep()] == estimate.extra["critical_lr"]
        warm.append(len(values))
        errors.append(abs(estimate.extra["critical_multiple"] / truth - 1))
    assert max(errors) <= 0.06
    assert np.median(errors) < 0.01
    assert np.median(cold) <= 7
    assert np.median(known) <= 5
    assert np.median(warm) <= 4
    assert max(cold + known + warm) <= 16


def test_the_tolerance_is_kept_and_paid_for() -> None:
    generator, num = torch.Generator().manual_seed(1), []
    for landscape in RANDOM:
        problem, x, d = random_case(generator, landscape)
        for rtol in (0.3, 0.001):
            estimate = CriticalStep(rtol=rtol, max_values=40)(along(problem, x, d))
            assert estimate.extra["critical_multiple"] == pytest.approx(crossing(problem, x, d), rel=rtol)
            num.append(estimate.extra["num_values"])
    assert sum(num[::2]) < sum(num[1::2])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "name"),
    [(networks.Convolutional, "sgd"), (networks.Gpt, "sgd"), (networks.Gpt, "adam"), (networks.Recurrent, "adam")],
)
def test_on_networks_it_is_what_a_dense_scan_finds(kind, name) -> None:
    model, memory = kind().double(), {}
    batches = networks.images(1, 16) if kind is networks.Convolutional else networks.texts(1, 16)
    batch = tuple(t.double() if t.is_floating_point() else t for t in batches[0])
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[name](parameters)
    for index in range(2):
        state = RandomState.capture()
        optimizer.zero_grad()
        classification(model, batch).backward()
        start = vectors.clone(parameters)
        optimizer.step()
        end = vectors.clone(parameters)
        objective = Objective(model, classification, [MicroBatch(batch, state)], parameters)
        lr = optimizer.param_groups[0]["lr"]
        step = Step(index, objective, start, end, lr, memory=memory)
        with objective.isolated():
            estimate = CriticalStep()(step)
            d, here = vectors.sub(end, start), objective.value(start)
            scan = np.geomspace(0.5, 1e5, 617)  # two per cent apart
            beyond = next(m for m in scan if objective.value(vectors.add_scaled(start, d, m)) > here)
        assert estimate.status is Status.OK
        assert estimate.extra["critical_multiple"] == pytest.approx(beyond, rel=0.06 + 0.02)
        assert estimate.extra["num_values"] <= (12 if index == 0 else 6)


def test_the_next_step_begins_where_the_last_one_ended_in_units_of_the_rate() -> None:
    problem, x = problems.exponential(1.0, 1.0, dim=2), torch.tensor([1.0, 2.0], dtype=torch.float64)
    g, memory = problem.gradient(x), {}
    first = CriticalStep()(along(problem, x, -0.001 * g, lr=0.001, memory=memory))
    # a step a hundred times as long, at a rate a hundred times as large
    again = CriticalStep()(along(problem, x, -0.1 * g, lr=0.1, memory=memory))
    assert again.extra["num_values"] == 3 < first.extra["num_values"]
    assert again.extra["critical_lr"] == pytest.approx(first.extra["critical_lr"], rel=0.12)
    assert CriticalStep(rtol=0.05)(along(problem, x, -0.001 * g, lr=0.001, memory=memory)).extra["num_values"] > 4


def test_without_one_rate_only_the_multiple_is_known() -> None:
    problem, x, memory = problems.quadratic((2.0,)), torch.tensor([1.0], dtype=torch.float64), {}
    for num in (5, 4):  # the first value of the second search is the crossing itself, zero but for rounding
        estimate = CriticalStep()(along(problem, x, -0.1 * x, lr=math.nan, memory=memory))
        assert estimate.status is Status.OK
        assert estimate.extra["critical_multiple"] == pytest.approx(20.0, rel=1e-6)
        assert math.isnan(estimate.smoothness)
        assert math.isnan(estimate.extra["critical_lr"])
        assert estimate.extra["num_values"] == num


def test_losses_that_overflow_have_risen() -> None:
    problem, x = problems.exponential(1.0, 1.0), torch.tensor([5.0], dtype=torch.float64)
    d = torch.tensor([-2000.0], dtype=torch.float64)
    step = along(problem, x, d)
    values = counted(step)
    estimate = CriticalStep()(step)
    assert not all(map(math.isfinite, values))
    assert estimate.status is Status.OK
    assert estimate.extra["critical_multiple"] == pytest.approx(crossing(problem, x, d), rel=0.06)


class Wall(torch.nn.Module):
    """A parabola around 0 that ends in NaN beyond |x| = 1.2."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        return (self.x**2).where(self.x.abs() < 1.2, torch.tensor(math.nan, dtype=torch.float64)).sum()


def test_nan_beyond_the_crossing_does_not_hide_it() -> None:
    module = Wall()
    objective = Objective(module, lambda m, _: m(), [MicroBatch(None, RandomState.capture())], [module.x])
    start = [module.x.detach().clone()]
    for length in (0.1, 1.0, 10.0):
        estimate = CriticalStep()(Step(0, objective, start, [start[0] - length], 0.1))
        assert estimate.status is Status.OK
        assert estimate.extra["critical_multiple"] == pytest.approx(2 / length, rel=1e-6)


def test_a_step_uphill_has_no_critical_rate() -> None:
    problem, x = problems.quadratic((1.0, 4.0)), torch.tensor([1.0, 1.0], dtype=torch.float64)
    for sign in (1.0, 1e-6, 1e3):
        step = along(problem, x, sign * problem.gradient(x), memory={CriticalStep(): 0.3})
        estimate = CriticalStep()(step)
        assert estimate.status is Status.NO_DESCENT
        assert math.isnan(estimate.smoothness)
        assert math.isnan(estimate.extra["critical_lr"])
        assert step.memory == {CriticalStep(): 0.3}, "the last rate known is still the best start"
        assert estimate.extra["num_values"] <= 6
    step = along(problem, x, problem.gradient(x))
    step.at_start  # noqa: B018, the gradient tells at once
    estimate = CriticalStep()(step)
    assert (estimate.status, estimate.extra["num_values"]) == (Status.NO_DESCENT, 0)


def test_a_loss_that_never_rises_has_no_critical_rate() -> None:
    problem, x = problems.logistic((1.0, -2.0)), torch.tensor([0.3, -0.4], dtype=torch.float64)
    for memory in ({}, {CriticalStep(): 0.1}):
        estimate = CriticalStep()(along(problem, x, -problem.gradient(x), memory=memory))
        assert estimate.status is Status.NO_CROSSING
        assert math.isnan(estimate.smoothness)
        assert estimate.extra["num_values"] <= 12


def test_a_loss_that_does_not_change_says_nothing() -> None:
    problem, x = problems.quadratic((0.0, 0.0)), torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert CriticalStep()(along(problem, x, -x)).status is Status.BELOW_NOISE_FLOOR


def test_a_step_of_zero_or_to_nowhere_and_a_loss_of_nan_are_statuses() -> None:
    problem, x = problems.exponential(1.0, 1.0), torch.tensor([2.0], dtype=torch.float64)
    assert CriticalStep()(along(problem, x, 0 * x)).status is Status.ZERO_STEP
    assert CriticalStep()(along(problem, x, math.nan * x)).status is Status.NON_FINITE
    lost = CriticalStep()(along(problem, 1000 * x, -x))
    assert lost.status is Status.NON_FINITE
    assert lost.extra["num_values"] == 1


class Offset(torch.nn.Module):
    """A parabola of depth 1 on top of a large loss, in float32."""

    def __init__(self, height: float) -> None:
        super().__init__()
        self.x, self.height = torch.nn.Parameter(torch.tensor([1.0])), height

    def forward(self) -> torch.Tensor:
        return (self.x**2 + self.height).sum()


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("height", [10.0**k for k in range(9)])
def test_in_rounding_a_number_is_right_or_none(height, is_warm) -> None:
    module = Offset(height)
    objective = Objective(module, lambda m, _: m(), [MicroBatch(None, RandomState.capture())], [module.x])
    start = [module.x.detach().clone()]
    for length in (1e-3, 0.03, 0.3, 1.7):
        multiple = 2 / length
        memory = {CriticalStep(): 0.1 * multiple} if is_warm else {}
        estimate = CriticalStep()(Step(0, objective, start, [start[0] - length], 0.1, memory=memory))
        if height <= 1e5:  # the depth of the valley is 20 ulp and more
            assert estimate.status is Status.OK
        if height >= 1e7:
            assert estimate.status is Status.BELOW_NOISE_FLOOR
        if estimate.status is Status.OK:
            assert estimate.extra["critical_multiple"] == pytest.approx(multiple, rel=0.06)
        else:
            assert estimate.status in (Status.BELOW_NOISE_FLOOR, Status.NOT_CONVERGED)
            assert math.isnan(estimate.smoothness)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [networks.Convolutional, networks.Gpt, networks.Recurrent])
@pytest.mark.parametrize("narrow", [False, True])
def test_losses_are_rounded_by_less_than_is_allowed_for(kind, narrow) -> None:
    model = kind()
    batch = (networks.images(1, 32) if kind is networks.Convolutional else networks.texts(1, 32))[0]

    def loss_fn(m, b):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return classification(m, b)

    objective = Objective(model, loss_fn, [MicroBatch(batch, RandomState.capture())], list(model.parameters()))
    start = objective.point()
    test, here = self_test(objective, start, None)
    # On a short line the loss is a polynomial; what is left beside it is rounding.
    reach = (3e-3 if narrow else 3e-4) * float(vectors.norm(start) / vectors.norm(here.gradient))
    line = np.linspace(0, 1, 41)
    values = [objective.value(vectors.add_scaled(start, here.gradient, -reach * t)) for t in line]
    rounding = np.std(values - np.polyval(np.polyfit(line, values, 4), line))
    allowed = max(LOSS_ULPS * 2.0**-23, LOSS_PER_GRADIENT * test.gradient_error)
    assert 2 * rounding < allowed * here.loss < 100 * 20 * rounding


def test_it_ends_after_as_many_values_as_allowed() -> None:
    generator = torch.Generator().manual_seed(3)
    for landscape in RANDOM:
        problem, x, d = random_case(generator, landscape)
        for most in range(3, 9):
            step = along(problem, x, d)
            values = counted(step)
            estimate = CriticalStep(max_values=most, rtol=1e-4)(step)
            assert len(values) <= most
            assert (estimate.status is Status.OK) or (estimate.status is Status.NOT_CONVERGED and len(values) == most)


@pytest.mark.parametrize(("name", "values"), [("rtol", (0.0, -0.1, 0.6, math.nan)), ("max_values", (2, 3.0, True))])
def test_wrong_arguments_raise(name, values) -> None:
    for value in values:
        with pytest.raises(ValueError, match=name):
            CriticalStep(**{name: value})


@pytest.mark.parametrize(("a", "b"), [(1e-3, 1.0), (7.0, 1.0), (1.0, 1e3), (1.0, 0.1)])
def test_units(a, b) -> None:
    problem, x = problems.cosh(0.7, 2.0, dim=2), torch.tensor([0.5, -0.8], dtype=torch.float64)
    d = -0.3 * problem.gradient(x)
    first = CriticalStep()(along(problem, x, d, lr=0.3))
    # losses times a, parameters times b: the same step has the rate 0.3 b^2 / a
    other = CriticalStep()(along(problem.scaled(a, 1 / b), b * x, b * d, lr=0.3 * b**2 / a))
    assert other.smoothness == pytest.approx(first.smoothness * a / b**2, rel=1e-6)
    assert other.step_norm == pytest.approx(first.step_norm * b, rel=1e-6)
    assert other.extra["num_values"] == first.extra["num_values"]


def test_in_a_probe_it_takes_no_gradient_and_its_rows_are_dropped_and_counted() -> None:
    model, optimizer, batches = small_run(4)
    with Probe(
        model, optimizer, regression, estimators=[CriticalStep(), LocalSmoothness()], schedule=every(1)
    ) as probe:
        step_over(model, optimizer, probe.watch(batches))
    rows = [row for row in probe.trace if row["estimator"] == "critical_step"]
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert [row["num_grads"] for row in rows] == [0] * 4
    assert all(row["num_values"] > 0 and row["critical_lr"] * row["smoothness"] == pytest.approx(2) for row in rows)
    assert [math.isnan(row["grad_norm"]) for row in rows] == [False, True, True, True]  # the self-test knew the first
    assert fit_smoothness(probe.trace).dropped["other_estimator"] == 4
    frame = probe.trace.to_frame()
    with pytest.raises(ValueError, match="non_finite: 3"):
        fit_smoothness(frame[frame["step"] > 0], estimator="critical_step")


def test_in_a_probe_it_reuses_the_start_that_others_have_evaluated() -> None:
    model, optimizer, batches = small_run(4)
    estimators = [PathSmoothness(), CriticalStep()]
    with Probe(model, optimizer, regression, estimators=estimators, schedule=every(1), data="step") as probe:
        step_over(model, optimizer, probe.watch(batches))
    path, critical = (list(probe.trace)[i::2] for i in (0, 1))
    assert [row["grad_norm"] for row in critical] == [row["grad_norm"] for row in path]
    assert [row["loss"] for row in critical] == [row["loss"] for row in path]
    assert all(row["num_values"] < 8 for row in critical)

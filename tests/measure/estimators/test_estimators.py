"""measure.estimators.path, measure.estimators.local: secants agree with closed forms or have a status."""

import math
from dataclasses import replace

import pytest
import torch
from steps import step_on
from torch import Tensor

from smoothdiag import LocalSmoothness, Objective, PathSmoothness, Status, Step, problems
from smoothdiag.measure.loss.batches import MicroBatch, RandomState

LANDSCAPES = {
    "exponential": (problems.exponential(0.7, 2.0, dim=3), [0.3, -0.4, 0.5]),
    "cosh": (problems.cosh(0.7, 2.0, dim=3), [0.3, -0.4, 0.5]),
    "hybrid inside": (problems.hybrid(0.7, 2.0, dim=2), [0.1, -0.2]),
    "hybrid outside": (problems.hybrid(0.7, 2.0, dim=2), [1.0, -0.7]),
    "power 3": (problems.power(3.0, dim=3), [0.3, -0.4, 0.5]),
    "power 4": (problems.power(4.0, dim=3), [1.3, -0.4, 0.5]),
    "power 6": (problems.power(6.0, dim=1), [1.3]),
    "quadratic": (problems.quadratic((3.0, -5.0, 0.5)), [0.3, -0.4, 0.5]),
    "exp_linear": (problems.exp_linear((1.0, -2.0)), [0.3, -0.4]),
    "logistic": (problems.logistic((1.0, -2.0)), [0.3, -0.4]),
    "sum_exp": (problems.sum_exp(3), [0.3, -0.4, 0.5]),
    "sum_cosh": (problems.sum_cosh(3), [0.3, -0.4, 0.5]),
    "sine": (problems.sine(2), [0.3, 1.2]),
    "slow": (problems.slow(0.1), [0.4]),
    "valley": (problems.valley(), [0.8, 0.7]),
}


def secant(problem, x: Tensor, y: Tensor) -> float:
    return float((problem.gradient(y) - problem.gradient(x)).norm() / (y - x).norm())


@pytest.fixture(params=LANDSCAPES)
def landscape(request) -> tuple:
    problem, x = LANDSCAPES[request.param]
    return problem, torch.tensor(x, dtype=torch.float64)


def test_path_is_the_exact_secant_of_the_closed_form(landscape) -> None:
    problem, x = landscape
    y = x + 0.3 * torch.linspace(-1, 0.6, len(x), dtype=torch.float64)
    estimate = PathSmoothness()(step_on(problem, x, y))
    assert estimate.smoothness == pytest.approx(secant(problem, x, y), rel=1e-6)
    assert estimate.step_norm == pytest.approx(float((y - x).norm()), rel=1e-12)
    assert estimate.grad_norm == pytest.approx(float(problem.gradient(x).norm()), rel=1e-12)
    assert estimate.loss == pytest.approx(float(problem.value(x)), rel=1e-12)


def test_path_with_several_points_is_the_largest_of_the_secants(landscape) -> None:
    problem, x = landscape
    y = x + 0.3 * torch.linspace(-1, 0.6, len(x), dtype=torch.float64)
    points = (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6)
    estimate = PathSmoothness(points=points)(step_on(problem, x, y))
    secants = [(secant(problem, x, x + t * (y - x)), t) for t in points]
    assert estimate.smoothness == pytest.approx(max(secants)[0], rel=1e-6)


def test_small_radius_along_the_extreme_direction_tends_to_the_hessian_norm(landscape) -> None:
    problem, x = landscape
    step = step_on(problem, x, x + problem.extreme_direction(x))
    exact = float(problem.hessian_norm(x))
    errors = [
        abs(LocalSmoothness(radius=r, direction="update")(step).smoothness / exact - 1) for r in (1e-2, 1e-3, 1e-6)
    ]
    assert errors[2] < 1e-5
    # First-order convergence, where there is an error to speak of.
    assert errors[1] < 0.2 * errors[0] or errors[0] < 1e-6


def test_local_along_the_gradient_is_the_length_of_the_hessian_times_its_direction(landscape) -> None:
    problem, x = landscape
    hessian = torch.autograd.functional.hessian(problem.value, x)
    g = problem.gradient(x)
    estimate = LocalSmoothness()(step_on(problem, x, x))
    assert estimate.smoothness == pytest.approx(float((hessian @ g).norm() / g.norm()), rel=1e-5)
    assert estimate.step_norm == pytest.approx(1e-6 * float(x.norm()), rel=1e-6)


def test_local_goes_downhill() -> None:
    # On 1-d exp the secant to the left of x is smaller than exp(x), the one to the right larger.
    x = torch.tensor([1.0], dtype=torch.float64)
    estimate = LocalSmoothness(radius=0.1)(step_on(problems.exp_linear((1.0,)), x, x))
    assert estimate.smoothness == pytest.approx((math.exp(1) - math.exp(0.9)) / 0.1, rel=1e-9)


def test_a_radius_that_is_too_long_for_the_direction_is_corrected() -> None:
    # exp(30 x): over a thousandth of ||x|| = 1000 the gradient vanishes, over less it can be measured.
    problem, x = problems.exp_linear((30.0, 0.0)), torch.tensor([0.1, 1000.0])
    estimate = LocalSmoothness()(step_on(problem, x, x, gradient_error=1e-6))
    assert estimate.step_norm < 0.1
    assert estimate.smoothness == pytest.approx(900 * math.exp(3), rel=0.2)
    assert estimate.status in (Status.OK, Status.BELOW_NOISE_FLOOR)
    fixed = LocalSmoothness(radius=1e-3)(step_on(problem, x, x, gradient_error=1e-6))
    assert fixed.step_norm == pytest.approx(1.0, rel=1e-3)
    assert fixed.status is Status.SATURATED


def test_a_radius_that_drowns_in_noise_is_corrected() -> None:
    problem, x = problems.exponential(1.0, 1.0), torch.tensor([0.01])
    step = step_on(problem, x, x, gradient_error=1e-3)
    assert LocalSmoothness(radius=1e-3)(step).status is Status.BELOW_NOISE_FLOOR
    assert LocalSmoothness()(step).status is Status.OK
    assert LocalSmoothness()(step).smoothness == pytest.approx(float(problem.hessian_norm(x)), rel=0.02)


class Staircase(torch.nn.Module):
    """A loss whose slope is made of ``kinks`` small steps per unit of length, as a ReLU network's is."""

    def __init__(self, x0: float, offsets: Tensor) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.full((len(offsets),), x0, dtype=torch.float64))
        self.offsets = offsets

    def forward(self) -> Tensor:
        return (self.x - self.offsets).relu().sum()


def test_two_scales_tell_curvature_from_kinks_and_rounding() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    smooth = PathSmoothness()(step_on(problems.quadratic((1.0, 3.0)), x, x + 0.1))
    assert smooth.two_scale == pytest.approx(1.0, rel=1e-9)
    assert smooth.status is Status.OK

    # 10,000 coordinates with one kink each: the number of kinks crossed grows like h, the change like its root.
    offsets = torch.rand(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module = Staircase(0.5, offsets)
    objective = Objective(module, lambda m, _: m(), [MicroBatch(None, RandomState.capture())], [module.x])
    start = [module.x.detach().clone()]
    kinky = PathSmoothness()(Step(0, objective, start, [start[0] + 0.1], 0.1))
    assert kinky.two_scale == pytest.approx(2.0, rel=0.1)
    assert kinky.status is Status.KINK_LIMITED

    # One kink for all coordinates: the change is the same however short the displacement is.
    module = Staircase(0.5, torch.full((100,), 0.501, dtype=torch.float64))
    module.offsets[50:] = 0.0
    objective = Objective(module, lambda m, _: m(), [MicroBatch(None, RandomState.capture())], [module.x])
    start = [module.x.detach().clone()]
    jump = PathSmoothness()(Step(0, objective, start, [start[0] + 0.1], 0.1))
    assert jump.two_scale == pytest.approx(4.0, rel=1e-6)
    assert jump.status in (Status.ROUNDING_LIMITED, Status.SATURATED)


def test_the_second_scale_can_be_left_out() -> None:
    problem, x = problems.quadratic((1.0,)), torch.tensor([1.0], dtype=torch.float64)
    step = step_on(problem, x, x + 0.1)
    assert math.isnan(PathSmoothness(two_scale=False)(step).two_scale)
    assert step.objective.num_grads == 2


def test_a_loss_that_is_not_finite_at_the_far_point_is_a_status_though_its_gradient_is() -> None:
    problem, x = problems.quadratic((1.0,)), torch.tensor([1.0], dtype=torch.float64)
    step = step_on(problem, x, x + 0.1)
    objective = step.objective
    loss_fn, objective._loss_fn = objective._loss_fn, None
    objective._loss_fn = lambda m, b: loss_fn(m, b) + (math.inf if float(m.x.detach()) > 1.05 else 0.0)
    assert PathSmoothness()(step).status is Status.NON_FINITE


def test_the_coarsest_dtype_sets_the_radius() -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.ones(2))
            self.b = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self) -> Tensor:
            return 1e-3 * (self.a.double() ** 2 + self.b**2).sum()

    module = Mixed()
    objective = Objective(module, lambda m, _: m(), [MicroBatch(None, RandomState.capture())], [module.a, module.b])
    estimate = LocalSmoothness()(Step(0, objective, objective.point(), objective.point(), 0.1))
    assert estimate.step_norm == pytest.approx(1e-3 * 2.0, rel=1e-3)


def test_random_directions_depend_on_seed_and_step_alone() -> None:
    problem, x = problems.quadratic((3.0, 1.0, 0.5)), torch.ones(3, dtype=torch.float64)
    state = torch.get_rng_state()
    step = step_on(problem, x, x)
    first = LocalSmoothness(direction="random")(step)
    torch.rand(3)
    assert LocalSmoothness(direction="random")(step).smoothness == first.smoothness
    assert LocalSmoothness(direction="random", seed=1)(step).smoothness != first.smoothness
    assert LocalSmoothness(direction="random")(replace(step, index=1)).smoothness != first.smoothness
    torch.set_rng_state(state)
    LocalSmoothness(direction="random")(step)
    assert torch.equal(torch.get_rng_state(), state)


def test_saturation_is_one_where_the_gradient_turns_round() -> None:
    x = torch.tensor([2.0], dtype=torch.float64)
    estimate = PathSmoothness()(step_on(problems.quadratic((1.0,)), x, -x))
    assert estimate.saturation == pytest.approx(1.0)
    assert estimate.status is Status.SATURATED


def test_a_row_at_the_noise_floor_is_marked() -> None:
    problem, x = problems.quadratic((1.0,)), torch.tensor([2.0], dtype=torch.float64)
    # L = 1, ||g|| = 2, ||d|| = 0.1: the floor is sqrt(2) * error * 2 / 0.1, and is half of L at error 0.0177.
    for error, status in ((0.0170, Status.OK), (0.0184, Status.BELOW_NOISE_FLOOR)):
        estimate = PathSmoothness()(step_on(problem, x, x - 0.1, gradient_error=error))
        assert estimate.noise_floor == pytest.approx(math.sqrt(2) * error * 20, rel=1e-9)
        assert estimate.status is status


def test_coinciding_points_are_a_status() -> None:
    x = torch.tensor([2.0], dtype=torch.float64)
    step = step_on(problems.quadratic((1.0,)), x, x)
    estimate = PathSmoothness()(step)
    assert estimate.status is Status.ZERO_STEP
    assert math.isnan(estimate.smoothness)
    assert step.objective.num_grads == 2  # how far it is, is known together with the gradient


@pytest.mark.parametrize("estimator", [LocalSmoothness(), LocalSmoothness(direction="update")])
def test_no_direction_or_no_scale_is_a_status(estimator) -> None:
    origin = torch.zeros(2, dtype=torch.float64)
    assert estimator(step_on(problems.quadratic((1.0, 1.0)), origin, origin)).status is Status.ZERO_STEP


def test_overflow_at_the_far_point_is_a_status() -> None:
    x = torch.tensor([1.0], dtype=torch.float64)
    estimate = PathSmoothness()(step_on(problems.exponential(), x, 1000 * x))
    assert estimate.status is Status.NON_FINITE
    assert math.isnan(estimate.smoothness)
    assert estimate.grad_norm == pytest.approx(math.e - 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_ends_nowhere_is_a_status(value) -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    step = step_on(problems.quadratic((1.0, 1.0)), x, torch.tensor([value, 2.0], dtype=torch.float64))
    assert PathSmoothness()(step).status is Status.NON_FINITE
    assert LocalSmoothness(direction="update")(step).status is Status.NON_FINITE
    assert LocalSmoothness()(step).status is Status.OK


def test_overflow_at_the_start_costs_no_further_gradient() -> None:
    x = torch.tensor([1000.0], dtype=torch.float64)
    step = step_on(problems.exponential(), x, x / 2)
    assert LocalSmoothness()(step).status is Status.NON_FINITE
    assert step.objective.num_grads == 1


def test_displacement_is_the_one_really_made() -> None:
    # bfloat16 cannot represent 1.03: the next numbers are 1.0234 and 1.03125.
    x, y = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.03], dtype=torch.bfloat16)
    estimate = PathSmoothness()(step_on(problems.quadratic((1.0,)), x, y))
    assert estimate.step_norm == 0.03125
    assert estimate.smoothness == pytest.approx(1.0, rel=1e-6)


def test_a_batch_given_twice_changes_nothing() -> None:
    module = torch.nn.Linear(3, 2).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    end = [p.detach() + 0.1 for p in module.parameters()]
    values = []
    for batch in ((x, y), (torch.cat([x, x]), torch.cat([y, y]))):
        objective = Objective(
            module,
            lambda m, b: (m(b[0]) - b[1]).square().mean(),
            [MicroBatch(batch, RandomState.capture())],
            list(module.parameters()),
        )
        estimate = PathSmoothness()(Step(0, objective, objective.point(), end, 0.1))
        values.append((estimate.grad_norm, estimate.smoothness))
    assert values[0] == pytest.approx(values[1], rel=1e-12)

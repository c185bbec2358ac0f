"""docs/lower_bound.py: fixed rates pay for steep starts and clipped descent does not, as the bound of 2019 says."""

import math

import numpy as np
import pytest
import torch
from places import REPOSITORY
from scripts import load
from torch.testing import assert_close

from smoothdiag import problems
from smoothdiag.optim import Clipped, ClippedMomentum, GradientDescent

SCRIPT = REPOSITORY / "docs" / "lower_bound.py"


@pytest.fixture(scope="module")
def script():
    return load(SCRIPT)


def descend(optimizer_of, x0, L0=1.0, L1=1.0, dim=1, num_steps=300, until=0.0):
    """Returns the gradient norms on the way down from ||x|| = x0 / L1; stops where it diverges or reaches ``until``."""
    problem = problems.hybrid(L0, L1, dim=dim)
    p = torch.full((dim,), x0 / L1 / dim**0.5, dtype=torch.float64, requires_grad=True)
    optimizer, norms = optimizer_of([p]), []
    for _ in range(num_steps):
        p.grad = problem.gradient(p.detach())
        norms.append(p.grad.norm().item())
        if not until < norms[-1] < 1e100:
            break
        optimizer.step()
    return norms


@pytest.mark.parametrize(("L0", "L1", "dim"), [(1.0, 1.0, 1), (0.3, 7.0, 1), (20.0, 0.2, 3)])
def test_the_rate_one_over_L0_diverges_from_2_69_and_not_from_2_67(L0, L1, dim):
    for optimizer_of in (
        lambda p: GradientDescent(p, Clipped(1 / L0, math.inf)),
        lambda p: torch.optim.SGD(p, 1 / L0),
    ):
        assert descend(optimizer_of, 2.67, L0, L1, dim)[-1] < 1e-12 * L0 / L1
        assert not descend(optimizer_of, 2.69, L0, L1, dim)[-1] < 1e100


@pytest.mark.thorough
@pytest.mark.parametrize(("L0", "L1", "dim"), [(0.3, 7.0, 1), (20.0, 0.2, 3)])
def test_clipped_descent_converges_from_a_hundred(L0, L1, dim):
    for num_steps, optimizer_of in (
        (300, lambda p: GradientDescent(p, Clipped(0.5 / L0, L0 / L1))),
        (300, lambda p: ClippedMomentum.sgd_clip(p, 0.5 / L0, threshold=L0 / L1)),
        (300, lambda p: ClippedMomentum.sgd_clip(p, 0.5 / L0, longest_step=0.5 / L1)),
        (1400, lambda p: ClippedMomentum.mom_clip(p, 0.5 / L0, threshold=0.2 * L0 / L1)),
    ):
        norms = descend(optimizer_of, 100.0, L0, L1, dim, num_steps)
        assert norms[0] > 1e42 * L0 / L1
        assert norms[-1] < 1e-6 * L0 / L1


def test_the_script_descends_the_hybrid_landscape(script):
    x = torch.linspace(-6, 6, 25, dtype=torch.float64)
    expected = torch.cat([problems.hybrid(1.0, 1.0).gradient(v[None]) for v in x])
    assert_close(torch.from_numpy(script.steep(x.numpy())), expected)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("rate", "threshold"), [(0.5, 1.0), (0.02, math.inf), (0.1, math.inf), (0.11, math.inf), (0.13, math.inf)]
)
def test_the_script_counts_steps_as_a_literal_loop_does(script, rate, threshold):
    clipped = Clipped(rate, threshold)
    norms = descend(lambda p: GradientDescent(p, clipped), 1 + math.log(100), num_steps=2000, until=script.TOLERANCE)
    below = [k for k, n in enumerate(norms) if n <= script.TOLERANCE]
    expected = below[0] if below else math.inf
    assert script.steep_steps(100, np.array([rate]), threshold)[0] == expected


def test_the_script_counts_steps_on_the_flat_function(script):
    e = script.TOLERANCE

    def f(x):
        return e / 4 * (6 * x**2 - x**4) if x <= 1 else e * 5 / 4 + 2 * e * (x - 1)

    x, steps = torch.tensor(1 + (0.1 - e * 5 / 4) / (2 * e), dtype=torch.float64), 0
    assert f(x) == pytest.approx(0.1)
    while True:
        x.requires_grad_()
        (g,) = torch.autograd.grad(f(x), x)
        if g <= e:
            break
        x, steps = (x - 0.05 * g).detach(), steps + 1
    assert script.flat_steps(0.05, gap=0.1) == pytest.approx(steps, abs=1)


@pytest.mark.thorough
def test_steps_of_fixed_rates_grow_with_the_gradient_and_those_of_clipped_descent_do_not(script):
    low, high = script.row(30.0), script.row(3000.0)
    # By M for the theorem's rate; by M/log M, here 55, for the best and for the largest that converges.
    assert high.steep_theorem > 80 * low.steep_theorem
    assert high.steep_best > 30 * low.steep_best
    assert high.flat_fixed > 30 * low.flat_fixed
    # A step of 1/(2 L1) divides the gradient by 1.65: log M, here 9 steps more, and none on the flat function.
    assert high.steep_clipped - low.steep_clipped == pytest.approx(2 * math.log(100), abs=1)
    assert high.flat_clipped == low.flat_clipped
    assert high.steep_clipped < high.steep_best / 10
    assert "| 3000 |" in script.table([low, high])


def test_the_figure_has_labels_and_all_lines(script):
    figure = script.draw_figure([script.row(10.0), script.row(100.0)])
    assert [len(ax.lines) for ax in figure.axes] == [3, 2]
    assert all(ax.get_ylabel() == "steps to the tolerance" for ax in figure.axes)
    assert "M" in figure.axes[1].get_xlabel()

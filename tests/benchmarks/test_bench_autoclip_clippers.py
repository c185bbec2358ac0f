"""benchmarks/autoclip: clippers and rivals follow their formulas."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benched import give, modules, quadratic, set_up
from torch import nn

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def bench():
    return modules()


def test_cap_shortens_the_sustained_step_to_the_length_given(bench) -> None:
    loop, cap = set_up(bench, quadratic(bench), arm="relative_0.03")  # ||x|| = 5, so 0.15
    give(loop, [6.0, 8.0])  # at rate 0.1 and momentum 0.9 a step of length 10
    cap.before()
    torch.testing.assert_close(loop.parameters[0].grad, torch.tensor([0.09, 0.12]))
    give(loop, [0.06, 0.08])
    cap.before()
    torch.testing.assert_close(loop.parameters[0].grad, torch.tensor([0.06, 0.08]))
    assert (cap.clipped, cap.longest_step) == (1, pytest.approx(0.15))


def test_cap_shortens_updates_of_adam(bench) -> None:
    loop, cap = set_up(bench, quadratic(bench, "adamw"), lr=1.0, arm="relative_0.03")
    start = loop.parameters[0].detach().clone()
    bench.training.step(loop, cap, torch.ones(4))
    # Adam's first step is the rate times the sign, and the decay of weights takes a hundredth of (3, 4).
    whole = torch.tensor([1.03, 1.04])
    torch.testing.assert_close(loop.parameters[0].detach() - start, -0.15 * whole / whole.norm())
    assert cap.clipped == 1


def test_grid_of_the_oracle_keeps_lengths_across_rates(bench) -> None:
    workload = quadratic(bench)
    typical = bench.training.typical_step(workload)
    for lr in (0.1, 0.4):
        loop, cap = set_up(bench, workload, lr, "fixed1")
        give(loop, [60.0, 80.0])
        cap.before()
        length = loop.steady_rate * float(loop.parameters[0].grad.norm())
        assert length == pytest.approx(typical / 27)


def test_percentile_counts_the_present_norm_and_no_nan(bench) -> None:
    clipper = bench.clippers.Percentile(None, 10.0)
    limits = [clipper.limit(norm) for norm in (3.0, 1.0, math.nan, 2.0)]
    np.testing.assert_allclose(limits, [3.0, 1.2, 1.2, 1.2])


def test_zclip_follows_its_formula(bench) -> None:
    clipper = bench.clippers.ZClip(None)
    first = [1.0, 2.0] * 12 + [1.5]
    assert all(clipper.limit(norm) == math.inf for norm in first)
    mean, deviation = np.mean(first), np.std(first)
    z = (10.0 - mean) / deviation
    assert clipper.limit(10.0) == pytest.approx(mean + 2.5**2 / z * deviation, rel=1e-4)
    assert clipper.mean == pytest.approx(0.97 * mean + 0.03 * (mean + 2.5**2 / z * deviation), rel=1e-4)
    assert clipper.limit(1.6) == math.inf


def test_agc_clips_row_by_row(bench) -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    weight.grad = torch.tensor([[0.3, 0.4], [1e-6, 0.0]])
    clipper = bench.clippers.AdaptiveGradientClipping(SimpleNamespace(parameters=[weight]))
    clipper.before()
    torch.testing.assert_close(weight.grad, torch.tensor([[0.03, 0.04], [1e-6, 0.0]]))
    assert clipper.clipped == 1


def test_agc_clips_filter_by_filter(bench) -> None:
    weight = nn.Parameter(torch.ones(2, 1, 2, 2))
    weight.grad = torch.stack([torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 1e-3)])
    bench.clippers.AdaptiveGradientClipping(SimpleNamespace(parameters=[weight])).before()
    torch.testing.assert_close(weight.grad[:, 0, 0, 0], torch.tensor([0.01, 1e-3]))


def test_adagc_follows_its_formula_before_and_after_the_warm_up(bench) -> None:
    random = np.random.default_rng(0)
    loop = SimpleNamespace(gradients=[])
    clipper = bench.rivals.AdaGC(loop)
    averages, clipped = [math.inf, math.inf], 0
    for step in range(140):
        given = [random.normal(size=size) * random.uniform(0.01, 0.9) for size in (3, 5)]
        loop.gradients = [torch.tensor(g) for g in given]
        clipper.before()
        norms = [np.linalg.norm(g) for g in given]
        if step < 100:
            scales = [min(1.0, 1 / math.hypot(*norms))] * 2
            averages = [min(a, s * n) for a, s, n in zip(averages, scales, norms, strict=True)]
        else:
            scales = [min(1.0, 1.05 * a / n) for a, n in zip(averages, norms, strict=True)]
            averages = [0.98 * a + 0.02 * s * n for a, s, n in zip(averages, scales, norms, strict=True)]
        clipped += min(scales) < 1
        for found, g, scale in zip(loop.gradients, given, scales, strict=True):
            np.testing.assert_allclose(found.numpy(), scale * g, rtol=1e-12)
    assert clipper.clipped == clipped
    assert 20 < clipped < 135, "some steps of either kind"


@pytest.mark.parametrize(("schedule", "most"), [("constant", 10.0), ("cosine", 5.0)])
def test_spectra_bends_singular_values_of_matrices_alone(bench, schedule, most) -> None:
    matrix, vector = nn.Parameter(torch.ones(3, 2, dtype=torch.float64)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([matrix, vector], lr=0.1, weight_decay=0.5)
    clipper = bench.rivals.Spectral(
        SimpleNamespace(optimizers=[optimizer], workload=SimpleNamespace(schedule=schedule))
    )
    c, s = math.cos(0.3), math.sin(0.3)
    u = torch.tensor([[c, -s], [s, c], [0.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    clipper.before()
    with torch.no_grad():  # an update with singular values 20 and 5, beside the decay of weights
        matrix.copy_(0.95 * matrix - 0.1 * u @ torch.diag(torch.tensor([20.0, 5.0]).double()) @ v)
        vector.sub_(30.0)
    clipper.after()
    bent = torch.tensor([value / math.sqrt(1 + (value / most) ** 2) for value in (20.0, 5.0)]).double()
    update = math.sqrt(3 / 2) * u @ torch.diag(bent) @ v
    torch.testing.assert_close(matrix.detach(), 0.95 - 0.1 * update, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vector.detach(), torch.full((2,), -29.0))
    assert clipper.clipped == 1


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_skipped_step_leaves_parameters_and_optimizer_as_they_were(bench, optimizer) -> None:
    loop, clipper = set_up(bench, quadratic(bench, optimizer), lr=1e-4, arm="skip_step")
    (x,) = loop.parameters

    def state() -> list[torch.Tensor]:
        return [v.clone() for v in (x.detach(), *loop.optimizers[0].state[x].values()) if isinstance(v, torch.Tensor)]

    batches = bench.training.data_of(loop.workload).batches(0)
    for batch, _ in zip(batches, range(64), strict=False):
        bench.training.step(loop, clipper, batch)
    assert clipper.clipped == 0
    before = state()
    bench.training.step(loop, clipper, torch.full((4,), 100.0))
    for now, then in zip(state(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert clipper.clipped == 1
    bench.training.step(loop, clipper, next(batches))
    assert clipper.clipped == 1
    assert not torch.equal(x.detach(), before[0])


def test_nothing_is_skipped_before_half_of_the_window_is_full(bench) -> None:
    loop, clipper = set_up(bench, quadratic(bench), lr=1e-4, arm="skip_step")
    for batch, _ in zip(bench.training.data_of(loop.workload).batches(0), range(62), strict=False):
        bench.training.step(loop, clipper, batch)
    bench.training.step(loop, clipper, torch.full((4,), 100.0))
    assert clipper.clipped == 0


def test_stable_adamw_divides_the_rate_by_the_root_mean_square(bench) -> None:
    x = np.array([3.0, -4.0, 0.5])
    p = nn.Parameter(torch.tensor(x))
    optimizer = bench.rivals.StableAdamW([p], lr=0.01)
    first, second = np.zeros(3), np.zeros(3)
    ratios = []
    for step, size in enumerate([1.0, 1.5, 0.1, 30.0], start=1):
        g = size * np.array([1.0, -2.0, 3.0])
        p.grad = torch.tensor(g)
        optimizer.step()
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
        ratios.append(np.sqrt(np.mean(g**2 / square)))
        lr = 0.01 / max(1.0, ratios[-1])
        x = x - lr * 0.01 * x - lr * mean / (np.sqrt(square) + 1e-8)
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-7)
    assert min(ratios) < 0.9 < 1.1 < max(ratios)


def test_schedule_free_is_judged_by_its_averaged_weights(bench) -> None:
    pytest.importorskip("schedulefree")
    loop, clipper = set_up(bench, quadratic(bench, "adamw"), arm="schedule_free")
    for batch, _ in zip(bench.training.data_of(loop.workload).batches(0), range(3), strict=False):
        bench.training.step(loop, clipper, batch)
    (x,), (optimizer,) = loop.parameters, loop.optimizers
    trained_at = x.detach().clone()
    found = bench.training.validate(loop)
    torch.testing.assert_close(x.detach(), trained_at)
    optimizer.eval()
    assert found == pytest.approx(float(x.detach().square().sum()), rel=1e-6)
    assert not torch.equal(x.detach(), trained_at)

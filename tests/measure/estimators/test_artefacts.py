"""measure.estimators: artefacts make naive measurements worthless, and the same steps seen by a probe are right."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from curved import flat
from networks import Point
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag import LocalSmoothness, PathSmoothness, Probe, every, fit_smoothness, problems
from smoothdiag.optim import ClippedMomentum

PATH = [PathSmoothness(two_scale=False)]


@pytest.mark.thorough
def test_different_batches_on_a_noisy_quadratic() -> None:
    # f = x'Hx/2 + z.x with another z for each batch, and steps of one length: the curvature has nothing to do with
    # the gradient norm, which is all noise.
    length, dim, num = 0.01, 50, 200
    curvature = torch.linspace(0.1, 1.0, dim, dtype=torch.float64)
    noise = [torch.randn(dim, dtype=torch.float64) * size for size in np.geomspace(1.0, 0.1, num)]

    def loss_fn(model: Point, z: Tensor) -> Tensor:
        return (curvature * model.x.square()).sum() / 2 + z @ model.x

    model = Point(torch.zeros(dim, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=length)
    probe = Probe(model, optimizer, loss_fn, estimators=PATH, schedule=every(1), data="step")
    points, gradients = [], []
    for z in probe.watch(noise):
        optimizer.zero_grad()
        loss_fn(model, z).backward()
        points.append(flat([model.x]))
        gradients.append(flat([model.x.grad]))
        model.x.grad /= model.x.grad.norm()
        optimizer.step()
    points.append(flat([model.x]))

    moves = [b - a for a, b in itertools.pairwise(points)]
    truth = np.array([float((curvature * d).norm() / d.norm()) for d in moves])
    frame = probe.trace.to_frame()
    np.testing.assert_allclose(frame["smoothness"], truth, rtol=1e-10)

    pairs = zip(gradients[:-1], gradients[1:], moves, strict=False)
    literal = np.array([float((b - a).norm() / d.norm()) for a, b, d in pairs])
    norms = np.array([float(g.norm()) for g in gradients[:-1]])
    assert (literal > 10 * truth[:-1]).all()
    assert np.corrcoef(literal, norms)[0, 1] > 0.98
    assert np.polyfit(norms, literal, 1)[0] == pytest.approx(math.sqrt(2) / length, rel=0.05)
    assert abs(np.corrcoef(frame["smoothness"], frame["grad_norm"])[0, 1]) < 0.3


def test_new_dropout_masks_at_the_two_points() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    batches = [(torch.randn(32, 8).double(), torch.randint(4, (32,))) for _ in range(5)]

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def gradient(batch: tuple[Tensor, Tensor]) -> Tensor:
        return flat(torch.autograd.grad(loss_fn(model, batch), list(model.parameters())))

    probe = Probe(model, optimizer, loss_fn, estimators=PATH, schedule=every(1), data="step")
    for batch in probe.watch(batches):
        masks = torch.get_rng_state()
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        start, here = flat(model.parameters()), flat(p.grad for p in model.parameters())
        optimizer.step()
        displacement = float((flat(model.parameters()) - start).norm())
        literal = float((gradient(batch) - here).norm()) / displacement
        torch.set_rng_state(masks)
        truth = float((gradient(batch) - here).norm()) / displacement
        assert probe.trace[-1]["smoothness"] == pytest.approx(truth, rel=1e-10)
        assert literal > 10 * truth


def fitted(loss_of: Callable[[Tensor], Tensor], copies: int, scale: float, repeats: int = 1, **options):
    """Fits what a probe records on the exponential landscape with (L0, L1) = (0.7, 2), clipped descent from r = 3.

    ``scale`` is how many times larger than the mean over examples the loss of the step is.
    """
    problem = problems.exponential(0.7, 2.0, dim=3)
    model = Point(torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64))
    optimizer = ClippedMomentum(model.parameters(), lr=0.3 / scale, threshold=0.2 * scale, momentum=0.0)

    def loss_fn(model: Point, tilts: Tensor) -> Tensor:
        return loss_of(problem.value(model.x) + tilts @ model.x)

    probe = Probe(model, optimizer, loss_fn, estimators=[LocalSmoothness()], schedule=every(1), **options)
    for _ in range(48):
        # Examples disagree, and their mean is the landscape.
        tilts = torch.randn(4, 3, dtype=torch.float64)
        tilts = (tilts - tilts.mean(0)).repeat(copies, 1)
        optimizer.zero_grad()
        for _ in range(repeats):
            probe.observe(tilts)
            loss = loss_fn(model, tilts)
            (loss if options else loss / repeats).backward()
        optimizer.step()
    return fit_smoothness(probe.trace, num_boot=20)


VARIANTS = {
    "mean over examples": (torch.mean, 1, 1.0),
    "sum over examples": (torch.sum, 1, 4.0),
    "batch given twice": (torch.mean, 2, 1.0),
    "sum over a batch given twice": (torch.sum, 2, 8.0),
}


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS)
def test_neither_sums_nor_copies_change_l1(variant) -> None:
    loss_of, copies, scale = VARIANTS[variant]
    fit = fitted(loss_of, copies, scale)
    assert fit.L1 == pytest.approx(2.0, rel=1e-4)
    assert fit.L0 == pytest.approx(0.7 * scale, rel=1e-3)


@pytest.mark.thorough
def test_nor_do_micro_batches_given_twice() -> None:
    averaged = fitted(torch.mean, 1, 1.0, repeats=2)
    added = fitted(torch.mean, 1, 2.0, repeats=2, reduction="sum")
    assert [averaged.L1, added.L1] == pytest.approx([2.0, 2.0], rel=1e-4)
    assert [averaged.L0, added.L0] == pytest.approx([0.7, 1.4], rel=1e-3)

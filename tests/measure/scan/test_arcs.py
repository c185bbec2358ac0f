"""measure.scan.arcs: blocks whose scale does not matter are found, and lines keep their norm."""

import copy

import numpy as np
import pytest
import torch
from networks import Point, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import smoothdiag as sd
from smoothdiag.measure.scan.arcs import Arcs, scale_invariant

MATRIX = torch.diag(torch.tensor([-2.0, 0.5, 1.0, 3.0, 9.0], dtype=torch.float64))
START = torch.tensor([0.8, -0.5, 1.1, 0.3, 0.4], dtype=torch.float64)


def sphere(model: nn.Module, batch: object) -> Tensor:
    """The quadratic u'Au/2 of u = w/||w||, which no scale of w changes."""
    u = model.x / model.x.norm()
    return u @ MATRIX @ u / 2


def gradient_and_hessian(w: Tensor) -> tuple[Tensor, Tensor]:
    """Returns g = (A w - 2 f w)/||w||^2 and H = (A - 2 f I - 2 (w g' + g w'))/||w||^2, by hand."""
    n, f = w @ w, w @ MATRIX @ w / (2 * w @ w)
    g = (MATRIX @ w - 2 * f * w) / n
    hessian = (MATRIX - 2 * f * torch.eye(5, dtype=w.dtype) - 2 * (torch.outer(w, g) + torch.outer(g, w))) / n
    return g, hessian


def noted(points: list[Tensor]):
    def measure(step: sd.Step) -> sd.Estimate:
        points.append(step.start[0].clone())
        return sd.HessianNorm()(step)

    return measure


@pytest.mark.parametrize("arcs", ["auto", False])
def test_points_on_the_sphere_and_beside_it_have_the_hessian_of_the_closed_form(arcs) -> None:
    points: list[Tensor] = []
    trace = sd.scan(
        Point(START), sphere, [None], arcs=arcs, estimators=[noted(points)], max_loss=99, budget=250, progress=False
    )
    rows = [row for row in trace if row["status"] == "ok"]
    assert len(rows) == len(points) > 10
    for row, w in zip(rows, points, strict=True):
        g, hessian = gradient_and_hessian(w)
        assert row["grad_norm"] == pytest.approx(float(g.norm()), rel=1e-9)
        assert row["smoothness"] == pytest.approx(float(torch.linalg.matrix_norm(hessian, 2)), rel=2e-3)
    norms = np.array([row["param_norm"] for row in rows])
    assert trace.meta["scan"]["arcs"] == ({"x": "whole"} if arcs else {})
    assert bool(np.allclose(norms, norms[0], rtol=1e-12)) is bool(arcs)


class Normalised(nn.Module):
    """A convolution with BatchNorm, whose scale does not matter, and a readout that does not move."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-14, affine=False)
        self.head = nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.conv(x))).mean((2, 3)))


def classification(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def normalised() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Normalised().double(), (torch.randn(16, 2, 5, 5, dtype=torch.float64), torch.randint(3, (16,)))


def test_behind_batchnorm_gradients_fall_as_weights_grow(normalised) -> None:
    model, batch = normalised
    loss = sd.objective(model, classification, [batch])
    products = [
        float(loss.evaluate([s * x for x in loss.point()]).gradient[0].norm() * s * loss.point()[0].norm())
        for s in (0.5, 1.0, 3.0)
    ]
    np.testing.assert_allclose(products, products[1], rtol=1e-9)


def test_a_ray_that_only_scales_weights_is_a_law_by_itself_and_arcs_show_nothing_of_it(normalised) -> None:
    model, batch = normalised
    grown = copy.deepcopy(model)
    with torch.no_grad():
        grown.conv.weight.mul_(3)

    def rows(arcs) -> list[dict]:
        trace = sd.scan(
            model,
            classification,
            [batch],
            directions=["to grown", "from grown"],
            toward={"grown": grown.state_dict()},
            arcs=arcs,
            max_distance=0.9,
            budget=200,
            progress=False,
        )
        assert trace.meta["scan"]["arcs"] == ({"conv.weight": "rows"} if arcs else {})
        return [row for row in trace if row["status"] == "ok"]

    (only,) = rows("auto")
    assert only["scan"] == "start"
    straight = rows(False)
    x, y = (np.log([row[name] for row in straight]) for name in ("grad_norm", "smoothness"))
    assert x.max() - x.min() > 2
    np.testing.assert_allclose(np.diff(y) / np.diff(x), 2, atol=0.05)
    np.testing.assert_allclose([row["loss"] for row in straight], only["loss"], rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_in_front_of_batchnorm_are_found_and_nothing_else(dtype) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 3)).to(dtype)
    batch = torch.randn(32, 2, 5, 5, dtype=dtype), torch.randint(3, (32,))
    loss = sd.objective(model, classification, [batch])
    x = loss.point()
    kinds = scale_invariant(x, lambda y: loss.evaluate(y).gradient, loss.evaluate(x).gradient, seed=0)
    found = {name for (name, _), kind in zip(model.named_parameters(), kinds, strict=True) if kind}
    assert found == {"0.weight", "3.weight"}
    assert set(kinds) == {"", "rows"}


def test_a_tensor_normalised_as_a_whole_is_found_as_a_whole() -> None:
    torch.manual_seed(0)
    model = mlp(6, 5, 3)
    batch = torch.randn(16, 6), torch.randint(3, (16,))

    def loss_fn(model, batch):
        hidden = F.linear(batch[0], model[0].weight / model[0].weight.norm(), model[0].bias).tanh()
        return F.cross_entropy(model[2](hidden), batch[1])

    loss = sd.objective(model, loss_fn, [batch])
    x = loss.point()
    assert scale_invariant(x, lambda y: loss.evaluate(y).gradient, loss.evaluate(x).gradient, seed=0) == [
        *("whole", "", "", "")
    ]


def test_a_bent_point_has_the_norms_of_the_start_and_the_directions_of_the_point() -> None:
    torch.manual_seed(0)
    start, point = ([torch.randn(3, 2, 2), torch.randn(4, 5), torch.randn(3)] for _ in range(2))
    bent = Arcs(["rows", "whole", ""], start).bend(point)
    torch.testing.assert_close(bent[0].flatten(1).norm(dim=1), start[0].flatten(1).norm(dim=1))
    torch.testing.assert_close(bent[1].norm(), start[1].norm())
    cosines = F.cosine_similarity(bent[0].flatten(1), point[0].flatten(1), dim=1)
    torch.testing.assert_close(cosines, torch.ones(3))
    assert torch.equal(bent[2], point[2])


def test_a_block_of_zeros_stays_zero() -> None:
    bent = Arcs(["rows"], [torch.ones(2, 3)]).bend([torch.zeros(2, 3)])
    assert torch.equal(bent[0], torch.zeros(2, 3))


def test_arcs_that_were_asked_for_must_exist() -> None:
    model = sd.problems.quadratic([1.0, 2.0]).as_module(torch.ones(2))
    with pytest.raises(ValueError, match="Parameter `arcs` should be False or .auto. for this model"):
        sd.scan(model, lambda model, batch: model(), [None], arcs=True, progress=False)

"""measure.estimators: rows in the norm of Muon, Scion and sign methods agree with closed forms and with a slow SVD."""

import math

import lion_pytorch
import pytest
import torch
from losses import cross_entropy
from networks import mlp
from torch import Tensor, nn

import smoothdiag as sd
from smoothdiag.adapters import adapter_of, unit_balls
from smoothdiag.geometry import Convolution, Product, Sign, Spectral
from smoothdiag.measure.estimators.base import OWN_PART

PATH, STEEPEST = (
    sd.PathSmoothness(geometry="optimizer"),
    sd.LocalSmoothness(direction="steepest", geometry="optimizer"),
)


class SignSGD(torch.optim.Optimizer):
    """Sign descent, as packages have it."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


class Weights(nn.Module):
    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(s, generator=drawn, dtype=torch.float64) for s in shapes)


def bowl(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Half the squared norm, each entry times its curvature, plus a gradient that belongs to the batch alone."""
    pairs = zip(model.weights, batch[0], batch[1], strict=True)
    return sum((0.5 * h * w.square() + e * w).sum() for w, h, e in pairs)


def curvatures(model: nn.Module, noise: float = 0.0, seed: int = 1) -> list[list[Tensor]]:
    drawn = torch.Generator().manual_seed(seed)
    steep = [torch.rand(w.shape, generator=torch.Generator().manual_seed(7)).double() + 0.1 for w in model.weights]
    return [steep, [noise * torch.randn(w.shape, generator=drawn).double() for w in model.weights]]


def rows(model, optimizer, estimators, *, steps: int = 1, noise: float = 0.0, **options) -> list[dict]:
    with sd.Probe(model, optimizer, bowl, estimators=estimators, schedule=sd.every(1), data="step", **options) as probe:
        for k in range(steps):
            batch = curvatures(model, noise, seed=k)
            probe.observe(batch)
            optimizer.zero_grad()
            bowl(model, batch).backward()
            optimizer.step()
    return list(probe.trace)


def muon_factor(shape: tuple[int, int], options: dict) -> float:
    """The factor of torch's Muon, written again."""
    if options.get("adjust_lr_fn") == "match_rms_adamw":
        return 0.2 * max(shape) ** 0.5
    return max(1.0, shape[0] / shape[1]) ** 0.5


@pytest.mark.parametrize("options", [{}, {"adjust_lr_fn": "match_rms_adamw"}], ids=str)
def test_rows_of_muon_are_those_of_a_slow_decomposition(options) -> None:
    shapes = [(6, 4), (3, 5)]
    model = Weights(*shapes)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1, weight_decay=0.0, **options)
    x0 = [w.detach().clone() for w in model.weights]
    (row,) = rows(model, optimizer, [PATH])
    steep, _ = curvatures(model)
    way = [w.detach() - x for w, x in zip(model.weights, x0, strict=True)]
    factors = [muon_factor(s, options) for s in shapes]

    def singular(vector: list[Tensor]) -> list[Tensor]:
        return [torch.linalg.svdvals(m) for m in vector]

    def dual(vector: list[Tensor]) -> float:
        return sum(float(s.sum()) * f for s, f in zip(singular(vector), factors, strict=True))

    length = max(float(s.max()) / f for s, f in zip(singular(way), factors, strict=True))
    assert (row["estimator"], row["group"], row["status"]) == ("path_own", "all", "ok")
    assert row["step_norm"] == pytest.approx(length, rel=1e-12)
    assert 0.06 < length < 0.13, "a step is one radius: the rate, up to what Newton-Schulz is off by"
    assert row["grad_norm"] == pytest.approx(dual([h * x for h, x in zip(steep, x0, strict=True)]), rel=1e-12)
    change = dual([h * d for h, d in zip(steep, way, strict=True)])
    assert row["smoothness"] == pytest.approx(change / length, rel=1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_rows_of_muon_beside_adamw_are_those_of_a_slow_decomposition(turned: bool) -> None:
    torch.manual_seed(0)
    model, options = mlp(4, 6, 3).double(), {"adjust_lr_fn": "match_rms_adamw"}
    matrices, others = ([p for p in model.parameters() if (p.ndim == 2) == wanted] for wanted in (True, False))
    muon, adamw = torch.optim.Muon(matrices, lr=0.1, **options), torch.optim.AdamW(others, lr=0.05)
    batches = [(torch.randn(16, 4).double(), torch.randint(3, (16,))) for _ in range(4)]
    starts, ends = [], []
    probe = sd.Probe(
        *(model, [muon, adamw], cross_entropy), estimators=[PATH, STEEPEST], schedule=sd.every(1), data="step",
        group_by=str,
    )  # fmt: skip
    for batch in probe.watch(batches):
        model.zero_grad()
        cross_entropy(model, batch).backward()
        starts.append([p.detach().clone() for p in model.parameters()])
        for optimizer in (adamw, muon) if turned else (muon, adamw):
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    twin = mlp(4, 6, 3).double()
    names = [name for name, p in twin.named_parameters() if p.ndim == 2]
    factors = {name: muon_factor(p.shape, options) for name, p in twin.named_parameters() if p.ndim == 2}

    def gradient(x: list[Tensor], batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            for p, value in zip(twin.parameters(), x, strict=True):
                p.copy_(value)
        found = torch.autograd.grad(cross_entropy(twin, batch), list(twin.parameters()))
        return dict(zip(dict(twin.named_parameters()), found, strict=True))

    def dual(g: dict[str, Tensor], among: list[str]) -> float:
        return sum(float(torch.linalg.svdvals(g[name]).sum()) * factors[name] for name in among)

    rows = list(probe.trace)
    assert len(rows) == 4 * 2 * 3, "biases have no norm of Muon"
    for row in rows:
        step = row["step"]
        x, batch = starts[step], batches[step]
        here, among = gradient(x, batch), names if row["group"] == OWN_PART else [row["group"]]
        if row["estimator"] == "path_own":
            y = ends[step]
        else:
            assert row["estimator"] == "local_steepest_own"
            y = [t.clone() for t in x]
            for (name, _), t in zip(twin.named_parameters(), y, strict=True):
                if name in names:
                    u, _, v = torch.linalg.svd(here[name], full_matrices=False)
                    t.sub_(u @ v, alpha=row["step_norm"] * factors[name])
        way = {name: b - a for (name, _), a, b in zip(twin.named_parameters(), x, y, strict=True)}
        length = max(float(torch.linalg.svdvals(way[name]).max()) / factors[name] for name in among)
        there = gradient(y, batch)
        change = dual({name: there[name] - here[name] for name in names}, among)
        assert row["grad_norm"] == pytest.approx(dual(here, among), rel=1e-10)
        assert row["step_norm"] == pytest.approx(length, rel=1e-10)
        assert row["smoothness"] == pytest.approx(change / length, rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_smoothness_of_one_product_in_the_spectral_norm_is_known(shape) -> None:
    # f(W) = (a'Wb)^2 / 2 changes its gradient a'Wb ab' by (a'Db) ab', at most |a|^2 |b|^2 in a nuclear norm for a
    # step D of spectral norm 1: along the polar factor of the gradient it is as much.
    a, b = (torch.randn(n, generator=torch.Generator().manual_seed(n)).double() for n in shape)
    model = Weights(shape)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
    loss = sd.objective(model, lambda model, batch: (a @ model.weights[0] @ b).square() / 2, [None])
    start = loss.point()
    balls = unit_balls(adapter_of(optimizer), list(model.parameters()))
    step = sd.Step(0, loss, start, [0.9 * start[0]], lr=0.1, balls=balls)
    factor = muon_factor(shape, {})
    found = STEEPEST(step)
    assert found.estimator == "local_steepest_own"
    assert found.smoothness == pytest.approx(float(a @ a) * float(b @ b) * factor**2, rel=1e-7)
    size = abs(float(a @ start[0] @ b)) * float(a.norm() * b.norm())
    assert found.grad_norm == pytest.approx(size * factor, rel=1e-12)
    # A step of rank one along -W shows less.
    assert PATH(step).smoothness < found.smoothness


@pytest.mark.parametrize("make", [SignSGD, lion_pytorch.Lion], ids=lambda make: make.__name__)
def test_sign_methods_see_the_sum_of_the_curvatures(make) -> None:
    model = Weights((5,), (2, 3))
    optimizer = make(model.parameters(), lr=0.01)
    before = torch.cat([w.detach().flatten() for w in model.weights])
    found = {row["estimator"]: row for row in rows(model, optimizer, [PATH, STEEPEST])}
    steep = torch.cat([h.flatten() for h in curvatures(model)[0]])
    for row in found.values():
        # the largest ||H d||_1 over all d with entries up to 1
        assert row["smoothness"] == pytest.approx(float(steep.sum()), rel=1e-7)
        assert row["grad_norm"] == pytest.approx(float((steep * before).abs().sum()), rel=1e-12)
    assert found["path_own"]["step_norm"] == pytest.approx(0.01, rel=1e-12)


def test_noise_of_the_batches_makes_no_law() -> None:
    model = Weights((5,), (2, 3))
    found = rows(model, SignSGD(model.parameters(), lr=0.3), [PATH], steps=12, noise=3.0)
    steep = float(sum(h.sum() for h in curvatures(model)[0]))
    assert max(r["grad_norm"] for r in found) > 1.5 * min(r["grad_norm"] for r in found)
    for row in found:
        assert row["smoothness"] == pytest.approx(steep, rel=1e-9)


def test_a_step_of_fixed_length_descends_up_to_twice_the_dual_norm_over_the_curvature() -> None:
    model = Weights((5,))
    before = model.weights[0].detach().clone()
    optimizer = SignSGD(model.parameters(), lr=0.01)
    (row,) = rows(model, optimizer, [sd.CriticalStep(rtol=0.01, max_values=40)])
    steep = curvatures(model)[0][0]
    # f(x - r s) - f(x) = -r ||g||_1 + r^2 / 2 s'Hs for s = sign(g)
    assert row["critical_lr"] == pytest.approx(2 * float((steep * before).abs().sum() / steep.sum()), rel=0.01)
    limit = adapter_of(optimizer).stability_limit(list(model.parameters()))
    assert math.isnan(limit[0]), "its steps never grow, whatever the curvature"


def test_optimizers_of_this_library_tell_their_geometries_and_groups_have_their_own() -> None:
    model = Weights((5,), (2, 3), (4, 4))
    optimizer = sd.ClippedScion(model.parameters(), lr=0.01, threshold=1.0, radius=3.0)
    found = {row["group"]: row for row in rows(model, optimizer, [PATH], group_by=lambda name: name[-1])}
    assert set(found) == {"all", "0", "1", "2"}
    product, groups = optimizer.product(model.parameters()), ("0", "1", "2")
    assert found["all"]["grad_norm"] == pytest.approx(sum(found[g]["grad_norm"] for g in groups), rel=1e-12)
    assert found["all"]["step_norm"] == pytest.approx(max(found[g]["step_norm"] for g in groups), rel=1e-12)
    literal = sd.PathSmoothness(geometry=product)
    again = Weights((5,), (2, 3), (4, 4))
    other = sd.ClippedScion(again.parameters(), lr=0.01, threshold=1.0, radius=3.0)
    (expected,) = rows(again, other, [literal])
    for column in ("grad_norm", "step_norm", "smoothness", "saturation", "two_scale"):
        assert found["all"][column] == pytest.approx(expected[column], rel=1e-12)


def test_where_some_parameters_have_no_such_norm_the_others_are_measured_alone() -> None:
    model = Weights((5,), (2, 3))
    steep = curvatures(model)
    loss = sd.objective(model, bowl, [steep])
    start = loss.point()
    end = [x + 0.1 * (1 + k) for k, x in enumerate(start)]
    groups = {"vector": [0], "matrix": [1], "both": [0, 1]}
    step = sd.Step(0, loss, start, end, lr=0.1, groups=groups, balls=[None, (Sign(), 2.0)])
    found = PATH(step)
    assert [found.group, *(part.group for part in found.parts)] == [OWN_PART, "matrix"]
    h = float(steep[0][1].sum())
    assert found.step_norm == pytest.approx(0.2 / 2.0)
    assert found.smoothness == pytest.approx(h * 2.0**2)
    assert step.norm_of_start(OWN_PART) == pytest.approx(float(start[1].norm()))
    steepest = STEEPEST(step)
    assert steepest.smoothness == pytest.approx(h * 2.0**2, rel=1e-7)


def test_adam_has_the_rows_of_its_preconditioner() -> None:
    model = Weights((5,), (2, 3))
    found = rows(model, torch.optim.Adam(model.parameters(), lr=0.01), [PATH, sd.PathSmoothness()])
    own, twin = ({r["estimator"]: r for r in found}[name] for name in ("path_own", "path_preconditioned"))
    for column in ("grad_norm", "step_norm", "smoothness"):
        assert own[column] == pytest.approx(twin[column], rel=1e-9)


@pytest.mark.parametrize("estimator", [PATH, STEEPEST], ids=["path", "local"])
def test_an_optimizer_without_a_norm_of_its_own_is_refused(estimator) -> None:
    model = Weights((5,))
    with pytest.raises(ValueError, match=r'`geometry` should be a norm, .* Found `geometry = "optimizer"`'):
        rows(model, torch.optim.SGD(model.parameters(), lr=0.1), [estimator])
    with pytest.raises(ValueError, match=r"`geometry` should be a Geometry"):
        type(estimator)(geometry="muon")


def test_steepest_descent_of_the_euclidean_norm_is_the_gradient() -> None:
    model = Weights((5,), (2, 3))
    found = rows(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        [sd.LocalSmoothness(), sd.LocalSmoothness(direction="steepest")],
    )
    assert [row["estimator"] for row in found] == ["local", "local_steepest"]
    for column in ("grad_norm", "step_norm", "smoothness"):
        assert found[0][column] == found[1][column]


def test_the_noise_floor_knows_that_noise_fills_a_nuclear_norm() -> None:
    # The gradient has rank one: its nuclear norm is its Euclidean one. Noise of the same length has four times that.
    n, error = 20, 1e-3
    a, b = (torch.randn(n, generator=torch.Generator().manual_seed(k)).double() for k in (1, 2))
    model = Weights((n, n))
    loss = sd.objective(model, lambda model, batch: a @ model.weights[0] @ b, [None])
    start = loss.point()
    balls = [(Spectral(exact=True), 1.0)]
    step = sd.Step(0, loss, start, [start[0] + 0.1], lr=0.1, balls=balls, gradient_error=error)
    found = PATH(step)
    drawn = torch.Generator().manual_seed(5)
    size = error * float(a.norm() * b.norm()) / n
    noise = [size * torch.randn(n, n, generator=drawn, dtype=torch.float64) for _ in range(2)]
    nuclear = float(torch.linalg.svdvals(noise[1] - noise[0]).sum())
    assert found.noise_floor * found.step_norm == pytest.approx(nuclear, rel=0.15)
    assert found.noise_floor * found.step_norm > 3 * math.sqrt(2) * error * found.grad_norm
    assert found.status is sd.Status.BELOW_NOISE_FLOOR


def test_balls_of_muon_fold_its_scale_into_the_radius() -> None:
    class Muon(torch.optim.Optimizer):
        """A class of that name, as other packages have it."""

        def __init__(self, params) -> None:
            super().__init__(params, {"lr": 0.1})

    model = Weights((8, 2), (4, 3, 3, 3), (5,))
    matrix, kernel, vector = model.parameters()
    found = unit_balls(adapter_of(Muon([matrix, kernel, vector])), [matrix, kernel, vector, nn.Parameter(matrix)])
    assert found[2:] == [None, None]
    (spectral, radius), (convolution, other) = found[:2]
    assert isinstance(spectral, Spectral)
    assert isinstance(convolution, Convolution)
    # U V' times the factor lies on the sphere of that radius.
    for p, geometry, length, factor in ((matrix, spectral, radius, 2.0), (kernel, convolution, other, 1.0)):
        u, _, v = torch.linalg.svd(p.detach().reshape(p.shape[0], -1), full_matrices=False)
        assert float(geometry.norm((factor * u @ v).reshape(p.shape))) == pytest.approx(length, rel=1e-12)
    auxiliary = Muon([{"params": [matrix], "use_muon": False}, {"params": [kernel], "use_adjusted_lr": True}])
    assert unit_balls(adapter_of(auxiliary), [matrix])[0] is None
    ball = unit_balls(adapter_of(auxiliary), [kernel])[0]
    assert ball is not None
    assert ball[1] == pytest.approx(0.2 * math.sqrt(27) * other)
    unknown = Muon([{"params": [matrix], "adjust_lr_fn": "spectral_unclamped"}])
    assert unit_balls(adapter_of(unknown), [matrix]) == [None]


def test_an_optimizer_that_answers_itself_may_leave_the_question_out() -> None:
    class Silent:
        """An adapter from before the question."""

    assert unit_balls(Silent(), [torch.ones(1), torch.ones(2)]) == [None, None]
    assert Product((Sign(),)) == Product((Sign(),), (1.0,))

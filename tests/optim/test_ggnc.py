"""optim.ggnc: steps agree with a literal twin of the paper, and options, states and refusals behave."""

import copy
import io
import itertools
import math
import pickle
from functools import partial

import grouped
import pytest
import torch
from asserts import NoSync
from grouped import set_grads
from reference import SlowGGNC
from torch.testing import assert_close

from smoothdiag.geometry import (
    RMS,
    ByShape,
    Column,
    Convolution,
    Diagonal,
    Euclidean,
    Frobenius,
    Product,
    Row,
    Sign,
    Spectral,
)
from smoothdiag.optim import ClippedMomentum
from smoothdiag.optim.ggnc import GGNC
from smoothdiag.optim.scion import ClippedScion

F64 = torch.float64
GEOMETRIES = {
    "euclidean": Euclidean(), "frobenius": Frobenius(), "rms": RMS(), "sign": Sign(), "row": Row(), "table": Row(True),
    "sign_per_input": Sign(per_input=True), "column": Column(), "spectral": Spectral(exact=True),
    "convolution": Convolution(exact=True), "transposed": Convolution(exact=True, transposed=True),
}  # fmt: skip
# Matrices, kernels, vectors with a scalar and an empty one; the last group never sees a gradient.
SHAPES = [[(3, 4), (4, 2)], [(2, 3, 2, 2)], [(4,), (), (0,)], [(2,)]]
DEFAULTS = {
    "lr": 0.1, "threshold": 1.0, "longest_step": None, "momentum": 0.9, "weight_decay": 0.0, "short_step": "bound",
    "radius": 1.0, "maximize": False,
}  # fmt: skip
MIXES = [
    ("euclidean", "euclidean", "euclidean"),
    ("spectral", "convolution", "rms"),
    ("sign", "transposed", "euclidean"),
    ("sign_per_input", "row", "frobenius"),
    ("column", "sign_per_input", "rms"),
    ("table", "frobenius", "sign_or_rms"),
]


def options_for(mix, *changes, **more):
    names = [n.replace("sign_or_", "") for n in (*mix, "rms")]
    changes = changes or ({},) * 4
    return [{**DEFAULTS, "geometry": n, **more, **c} for n, c in zip(names, changes, strict=True)]


make_groups = partial(grouped.make_groups, SHAPES, scale=0.3)
random_grads = partial(grouped.random_grads, SHAPES)


def as_groups(groups, options):
    return [{"params": p, **o, "geometry": GEOMETRIES[o["geometry"]]} for p, o in zip(groups, options, strict=True)]


def compare_with_twin(options, num_steps=100, schedule=None, foreach=None):
    groups = make_groups()
    optimizer = GGNC(
        as_groups(groups, options), lr=9.0, threshold=9.0, geometry=RMS(), foreach=foreach,
        short_step=options[0]["short_step"],
    )  # fmt: skip
    scheduler = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    twin = SlowGGNC([[p.detach().clone() for p in group] for group in groups], options)
    rates = [o["lr"] for o in options]
    generator = torch.Generator().manual_seed(1)
    for step in range(num_steps):
        grads = random_grads(step, generator)
        set_grads(groups, grads)
        optimizer.step()
        for o, rate in zip(options, rates, strict=True):
            o["lr"] = rate if schedule is None else rate * schedule(step)
        twin.step(grads)
        if scheduler is not None:
            scheduler.step()
        assert_close([[p.detach() for p in group] for group in groups], twin.groups, rtol=1e-9, atol=1e-9)
    for p, d in zip(itertools.chain(*groups), itertools.chain(*twin.momenta), strict=True):
        if optimizer.state[p]:
            sign = -1 if options[0]["maximize"] else 1
            assert_close(optimizer.state[p]["momentum_buffer"], sign * torch.from_numpy(d), rtol=1e-12, atol=1e-12)
    moved = [not torch.equal(p, q) for p, q in zip(groups[0], make_groups()[0], strict=True)]
    assert all(moved)


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"threshold": math.inf, "lr": 0.003},
        {"threshold": None, "longest_step": 0.1},
        {"weight_decay": 0.5},
        {"weight_decay": 0.5, "short_step": "norm"},
        {"maximize": True, "weight_decay": 0.5},
        {"radius": 3.0, "momentum": 0.0, "weight_decay": 2.0, "threshold": 5.0},
    ],
    ids=str,
)
def test_equals_the_twin(mix, more):
    compare_with_twin(options_for(mix, **more), num_steps=100 if mix == MIXES[1] else 30)


@pytest.mark.thorough
@pytest.mark.parametrize("short_step", ["bound", "norm"])
@pytest.mark.parametrize("mix", MIXES[:3], ids="-".join)
def test_equals_the_twin_with_options_for_each_group_and_a_schedule(mix, short_step):
    changes = [
        {"lr": 0.3, "threshold": 0.2, "momentum": 0.5, "radius": 0.5},
        {"lr": 0.01, "threshold": math.inf, "weight_decay": 0.3},
        {"threshold": None, "longest_step": 0.05, "radius": 2.0, "weight_decay": 1.0},
        {},
    ]
    options = options_for(mix, *changes, short_step=short_step)
    compare_with_twin(options, schedule=lambda step: 0.98**step, foreach=False if short_step == "norm" else None)


def start(shape=(3, 4), dtype=F64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype).requires_grad_()


def quadratic_run(optimizer, params, num_steps=30, scheduler=None):
    """Follows sum k x_k^2 / 2 over all entries."""
    path = []
    for _ in range(num_steps):
        for p in params:
            p.grad = torch.linspace(0.1, 2, p.numel(), dtype=p.dtype).view_as(p) * p.detach()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        path.append([p.detach().clone() for p in params])
    return path


@pytest.mark.parametrize("cap", [{"threshold": 0.5}, {"threshold": math.inf}, {"longest_step": 0.1}], ids=str)
def test_euclidean_is_clipped_gradient_descent_with_one_global_norm(cap):
    ours, theirs = ([start(seed=i) for i in range(3)] for _ in range(2))
    split = [{"params": ours[:1]}, {"params": ours[1:]}]
    found = quadratic_run(GGNC(split, lr=0.3, geometry=Euclidean(), **cap), ours)
    assert_close(found, quadratic_run(ClippedMomentum(theirs, lr=0.3, **cap), theirs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("geometry", "lr"), [(Sign(), 0.01), (Spectral(exact=True), 0.1), (RMS(), 0.01)])
def test_without_a_threshold_it_is_steepest_descent_with_the_dual_norm(geometry, lr):
    p, x, d = start(), start().detach(), torch.zeros(3, 4, dtype=F64)
    path = quadratic_run(GGNC([p], lr=lr, threshold=math.inf, geometry=geometry), [p])
    for (row,) in path:
        d = 0.9 * d + 0.1 * torch.linspace(0.1, 2, 12, dtype=F64).view(3, 4) * x
        x = x + lr * geometry.dual_norm(d) * geometry.lmo(d)
        assert_close(row, x, rtol=1e-11, atol=1e-12)


def test_sign_geometry_by_hand():
    p = torch.zeros(3, dtype=F64, requires_grad=True)
    optimizer = GGNC([p], lr=0.1, threshold=math.inf, momentum=0.0, geometry=Sign())
    p.grad = torch.tensor([1.0, -2.0, 0.0], dtype=F64)
    optimizer.step()
    assert_close(p.detach(), torch.tensor([-0.3, 0.3, 0.0], dtype=F64))
    optimizer.param_groups[0]["threshold"] = 2.0
    optimizer.step()
    assert_close(p.detach(), torch.tensor([-0.5, 0.5, 0.0], dtype=F64))


def test_a_small_threshold_at_a_fixed_product_is_scion():
    params = [start(), start((4,), seed=1), start((2, 3, 2, 2), seed=2)]
    radii, layers = (50.0, 3.0, 8.0), (Spectral(), RMS(), Convolution())
    groups = [{"params": [p], "radius": r} for p, r in zip(params, radii, strict=True)]
    xs, ds = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    path = quadratic_run(ClippedScion(groups, lr=1e4, threshold=1e-6, radius=1.0), params)
    for row in path:
        for i, (x, d, layer, radius) in enumerate(zip(xs, ds, layers, radii, strict=True)):
            ds[i] = 0.9 * d + 0.1 * torch.linspace(0.1, 2, x.numel(), dtype=F64).view_as(x) * x
            xs[i] = x + 1e-2 * radius * layer.lmo(ds[i])
        assert_close(row, xs, rtol=1e-9, atol=1e-8)


def test_constrained_scion_is_frank_wolfe_with_an_open_step():
    p, x, d = start(), start().detach(), torch.zeros(3, 4, dtype=F64)
    path = quadratic_run(ClippedScion([p], lr=1e5, threshold=1e-7, radius=5.0, weight_decay=1.0), [p], 20)
    for (row,) in path:
        d = 0.9 * d + 0.1 * torch.linspace(0.1, 2, 12, dtype=F64).view(3, 4) * x
        x = (1 - 1e-2) * x + 1e-2 * 5 * Spectral().lmo(d)
        assert_close(row, x, rtol=1e-10, atol=1e-10)


def test_the_dual_norm_is_that_of_the_product():
    shapes, layers, radii = [(3, 4), (5, 2), (4,)], (Spectral(exact=True), Sign(), RMS()), (2.0, 0.5, 3.0)
    params = [start(s, seed=i) for i, s in enumerate(shapes)]
    before = [p.detach().clone() for p in params]
    groups = [{"params": [p], "geometry": g, "radius": r} for p, g, r in zip(params, layers, radii, strict=True)]
    optimizer = GGNC(groups, lr=1e-3, threshold=math.inf, momentum=0.0, geometry=RMS())
    grads = [start(s, seed=7 + i).detach() for i, s in enumerate(shapes)]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()
    product = optimizer.product(params)
    assert product == Product(layers, radii)
    step = float(product.dual_norm(grads)) * 1e-3
    expected = [x + step * v for x, v in zip(before, product.lmo(grads), strict=True)]
    assert_close([p.detach() for p in params], expected, rtol=1e-12, atol=1e-12)


def test_the_product_follows_the_order_asked_for_and_needs_geometries_of_layers():
    p, q = start(), start((4,))
    optimizer = GGNC([{"params": [q]}, {"params": [p], "geometry": Sign()}], lr=0.1, threshold=1.0, geometry=RMS())
    assert optimizer.product([p, q]) == Product((Sign(), RMS()))
    with pytest.raises(ValueError, match=r"Parameter `params` should .* Found `geometry = \[RMS\(\), None\]`"):
        optimizer.product([q, start()])
    with pytest.raises(ValueError, match=r"Found `geometry = \[Euclidean\(\)\]`"):
        GGNC([p], lr=0.1, threshold=1.0, geometry=Euclidean()).product([p])


@pytest.mark.thorough
@pytest.mark.parametrize("geometry", [Euclidean(), Sign(), Spectral(exact=True), RMS()], ids=str)
@pytest.mark.parametrize("short_step", ["bound", "norm"])
def test_parameters_stay_in_the_ball(geometry, short_step):
    p = start()
    measure = geometry.norm if not isinstance(geometry, Euclidean) else torch.linalg.vector_norm
    with torch.no_grad():
        p *= 1.99 / measure(p)
    optimizer = GGNC(
        [p], lr=0.5, threshold=4.0, geometry=geometry, radius=1.0, weight_decay=0.5, short_step=short_step, momentum=0.5
    )
    reached = 0.0
    for seed in range(200):
        p.grad = start(seed=seed if seed > 50 else 0).detach() * 10.0
        optimizer.step()
        reached = max(reached, float(measure(p.detach())))
    assert 1.9 < reached <= 2 * (1 + 1e-12)


@pytest.mark.parametrize("geometry", [Euclidean(), Sign(), Spectral(exact=True)], ids=str)
def test_a_vanishing_decay_with_the_norm_is_none_and_with_the_bound_a_quarter(geometry):
    paths = []
    for more in ({}, {"weight_decay": 1e-12, "short_step": "norm"}, {"weight_decay": 1e-12, "lr": 0.04}):
        p = start()
        paths.append(quadratic_run(GGNC([p], **{"lr": 0.01, "threshold": math.inf, "geometry": geometry, **more}), [p]))
    assert_close(paths[1], paths[0], rtol=1e-8, atol=1e-8)
    assert_close(paths[2], paths[0], rtol=1e-8, atol=1e-8)


def test_decay_equals_algorithm_2_in_its_own_units():
    # b = 1 / weight_decay and rho = weight_decay * threshold.
    b, rho, lr = 4.0, 0.3, 0.2
    p, x, d = start(), start().detach(), torch.zeros(3, 4, dtype=F64)
    optimizer = GGNC([p], lr=lr, threshold=rho * b, geometry=Sign(), weight_decay=1 / b, short_step="norm")
    for (row,) in quadratic_run(optimizer, [p]):
        d = 0.9 * d + 0.1 * torch.linspace(0.1, 2, 12, dtype=F64).view(3, 4) * x
        v = x - b * Sign().lmo(d)
        x = x - lr * min(rho, float((d * v).sum() / Sign().norm(v) ** 2)) * v
        assert_close(row, x, rtol=1e-12, atol=1e-12)


def test_outside_of_the_ball_no_step_leads_further_away():
    p = torch.tensor([10.0], dtype=F64, requires_grad=True)
    optimizer = GGNC([p], lr=0.1, threshold=1.0, geometry=Sign(), weight_decay=1.0, momentum=0.0)
    p.grad = torch.full_like(p, -1.0)
    optimizer.step()
    assert p.item() == 10.0
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.item() < 10


def test_descends_where_the_law_holds_in_the_norm_of_the_geometry():
    # sum cosh(a x_i) in the largest entry: ||H u||_1 <= (a^2 n + a ||g||_1) ||u||, so L0 = a^2 n and L1 = a; over
    # steps of .38 / L1 the first-order constants are 1.25 and 1.22 times those.
    a, n = 2.0, 20
    for cap, monotone in ((a * n, True), (math.inf, False)):
        p = (3 * start((n,))).detach().requires_grad_()
        optimizer = GGNC([p], lr=1 / (2.6 * a**2 * n), threshold=cap, momentum=0.0, geometry=Sign())
        values = [torch.cosh(a * p).sum().item()]
        for _ in range(200):
            p.grad = a * torch.sinh(a * p.detach())
            optimizer.step()
            values.append(torch.cosh(a * p).sum().item())
        assert monotone == all(v <= u * (1 + 1e-12) for u, v in itertools.pairwise(values))
    assert not values[-1] < values[0], "the last one diverges"


def test_follows_its_units():
    # Loss times 3: lr / 3 and threshold * 3 make the same steps.
    p, q = start(), start()
    quadratic_run(GGNC([p], lr=0.1, threshold=0.5, geometry=Spectral(exact=True), weight_decay=0.1), [p])
    optimizer = GGNC([q], lr=0.1 / 3, threshold=1.5, geometry=Spectral(exact=True), weight_decay=0.1)

    def triple(*_):
        q.grad.mul_(3)

    optimizer.register_step_pre_hook(triple)
    quadratic_run(optimizer, [q])
    assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mix", [("euclidean",) * 3, ("spectral", "convolution", "rms"), ("sign", "row", "rms")])
def test_gradients_are_only_read(mix):
    groups = make_groups()
    optimizer = GGNC(as_groups(groups, options_for(mix, weight_decay=0.1)), lr=0.1, threshold=0.1, geometry=RMS())
    for step in range(5):
        set_grads(groups, random_grads(step, torch.Generator().manual_seed(step)))
        before = [p.grad for p in itertools.chain(*groups)]
        copies = copy.deepcopy(before)
        optimizer.step()
        for p, g, c in zip(itertools.chain(*groups), before, copies, strict=True):
            assert p.grad is g
            assert g is None or torch.equal(g, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [{"threshold": 0.3}, {"threshold": math.inf}, {"longest_step": torch.tensor(0.1)}])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_waits_for_no_device(cap, decay, dtype):
    groups = make_groups(dtype=dtype)
    geometries = [Spectral(), Convolution(), Sign(), Euclidean()]
    optimizer = GGNC(
        [{"params": p, "geometry": g} for p, g in zip(groups, geometries, strict=True)],
        torch.tensor(0.1), geometry=RMS(), weight_decay=decay, **cap,
    )  # fmt: skip
    for step in range(3):
        grads = random_grads(step, torch.Generator().manual_seed(step))
        grads[3] = [torch.ones(2)]
        set_grads(groups, grads)
        with NoSync():
            optimizer.step()
    assert all(p.isfinite().all() for p in itertools.chain(*groups))
    assert all(p.dtype == dtype for p in itertools.chain(*groups))


def test_bfloat16_parameters_follow_their_float32_twins():
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.zeros(32, 64, dtype=dtype, requires_grad=True)
        optimizer = ClippedScion([p], lr=1e-2, threshold=200.0, radius=1.0)
        for seed in range(3):
            p.grad = start((32, 64), torch.bfloat16, seed=seed).detach().to(dtype)
            optimizer.step()
        runs.append(p.detach().float())
    assert (runs[1] - runs[0]).norm() / runs[0].norm() < 0.01


MIXED = [{"geometry": Spectral()}, {"geometry": Convolution()}, {"geometry": RMS()}, {"geometry": Euclidean()}]


def fresh(groups):
    optimizer = GGNC(
        [{"params": p, **o} for p, o in zip(groups, MIXED, strict=True)],
        lr=0.1, threshold=0.5, geometry=RMS(), weight_decay=0.1,
    )  # fmt: skip
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_resumed_run_is_bit_identical(weights_only):
    def flat(groups):
        return list(itertools.chain(*groups))

    whole = make_groups(dtype=torch.float32)
    optimizer, scheduler = fresh(whole)
    path = quadratic_run(optimizer, flat(whole), 30, scheduler)

    first = make_groups(dtype=torch.float32)
    optimizer, scheduler = fresh(first)
    quadratic_run(optimizer, flat(first), 15, scheduler)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), scheduler.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=weights_only)
    second = [[p.detach().clone().requires_grad_() for p in group] for group in first]
    optimizer, scheduler = fresh(second)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    for row, expected in zip(quadratic_run(optimizer, flat(second), 15, scheduler), path[15:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(row, expected, strict=True))
    assert [g["geometry"] for g in optimizer.param_groups] == [o["geometry"] for o in MIXED]


def test_a_state_of_another_geometry_is_refused():
    p = start()
    optimizer = GGNC([p], lr=0.1, threshold=1.0, geometry=Spectral())
    quadratic_run(optimizer, [p], 3)
    other = GGNC([start()], lr=0.7, threshold=2.0, geometry=Spectral(exact=True))
    with pytest.raises(ValueError, match=r"saved group, Spectral\(\). Found `geometry = Spectral\(exact=True\)`"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.7
    assert not other.state
    two = GGNC([start(), start()], lr=0.7, threshold=2.0, geometry=Spectral())
    with pytest.raises(ValueError, match="doesn't match the size"):
        two.load_state_dict(optimizer.state_dict())


def test_pickles_with_its_geometry():
    p = start()
    optimizer = GGNC([p], lr=0.4, threshold=0.5, geometry=ByShape(vector=Sign()))
    quadratic_run(optimizer, [p], 3)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.param_groups[0]["geometry"] == ByShape(vector=Sign())
    q = twin.param_groups[0]["params"][0]
    assert_close(quadratic_run(twin, [q], 5), quadratic_run(optimizer, [p], 5), rtol=0, atol=0)


def test_a_schedule_moves_the_rate_and_leaves_the_threshold_or_the_longest_step():
    for name in ("threshold", "longest_step"):
        p = start()
        optimizer = GGNC([p], lr=0.4, geometry=Sign(), momentum=0.0, **{name: 0.05})
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        path = [start().detach(), *(row[0] for row in quadratic_run(optimizer, [p], 3, scheduler))]
        steps = [float((b - a).abs().max()) for a, b in itertools.pairwise(path)]
        assert steps == pytest.approx([0.02, 0.01, 0.005] if name == "threshold" else [0.05] * 3, rel=1e-12)
        assert optimizer.param_groups[0][name] == 0.05


def test_a_group_may_have_the_other_cap():
    p, q = start(), start()
    optimizer = GGNC([{"params": [p]}, {"params": [q], "longest_step": 0.1}], lr=0.1, threshold=1.0, geometry=RMS())
    assert [g["threshold"] for g in optimizer.param_groups] == [1.0, None]


INVALID = [
    ("lr", -0.1), ("lr", math.nan), ("threshold", 0.0), ("threshold", math.nan), ("threshold", None),
    ("longest_step", 0.5), ("momentum", 1.0), ("weight_decay", -1.0), ("radius", 0.0), ("radius", math.nan),
    ("short_step", "exact"), ("geometry", "spectral"), ("geometry", Spectral), ("geometry", Product((RMS(),))),
    ("geometry", Diagonal((torch.ones(3, 4),))), ("momentum", torch.tensor(0.9)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), INVALID, ids=lambda v: str(v)[:20])
def test_invalid_options_are_refused_everywhere(name, value):
    given = {"lr": 0.1, "threshold": 1.0, "geometry": RMS()}
    with pytest.raises(ValueError, match=r"Parameter `\w+` should .* Found `"):
        GGNC([start()], **{**given, name: value})

    p = start()
    optimizer = GGNC([p], **given)
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=r"Parameter `\w+` should .* Found `"):
        optimizer.step()
    assert torch.equal(p, start()), "a refused step moves nothing"
    assert not optimizer.state


def test_shapes_and_variants_that_do_not_fit_are_refused():
    p = start((3,))
    with pytest.raises(ValueError, match="2 dimensions for Spectral"):
        GGNC([p], lr=0.1, threshold=1.0, geometry=Spectral())
    optimizer = GGNC([p], lr=0.1, threshold=1.0, geometry=RMS())
    for wrong in ({"geometry": Spectral()}, {"short_step": "norm"}):
        with pytest.raises(ValueError, match="Parameter `s"):
            optimizer.add_param_group({"params": [start((4,))], **wrong})
        assert len(optimizer.param_groups) == 1
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["geometry"] = Spectral()
    with pytest.raises(ValueError, match="2 dimensions for Spectral"):
        optimizer.step()
    assert torch.equal(p, start((3,)))


def test_sparse_gradients_are_refused():
    sparse = torch.nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    dense = start()
    dense.grad = torch.ones_like(dense)
    with pytest.raises(RuntimeError, match="GGNC needs dense"):
        GGNC([dense, sparse.weight], lr=0.1, threshold=1.0, geometry=RMS()).step()
    assert torch.equal(dense, start())


def test_a_gradient_that_is_not_finite_shows_and_does_not_raise():
    for geometry in (Spectral(), Spectral(exact=True), Sign(), Euclidean(), RMS()):
        p, q = start(), start()
        p.grad, q.grad = torch.full_like(p, math.nan), torch.ones_like(q)
        GGNC([p, q], lr=0.1, threshold=1.0, geometry=geometry, weight_decay=0.1, short_step="norm").step()
        assert p.isnan().any()
        assert q.isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_compiles_without_graph_breaks(decay):
    runs = []
    for compiled in (False, True):
        torch.compiler.reset()
        params = [start((8, 6), torch.float32), start((4,), torch.float32, 1), start((2, 3, 2, 2), torch.float32, 2)]
        optimizer = ClippedScion(params, lr=0.01, threshold=1.0, radius=1.0, weight_decay=decay)
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if compiled else optimizer.step
        for _ in range(3):
            for p in params:
                p.grad = torch.linspace(0.1, 2, p.numel()).view_as(p) * p.detach()
            step()
        runs.append([p.detach().clone() for p in params])
    assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)

"""measure.curvature.operator: every way of multiplying agrees with the dense Hessian in each precision."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch
from asserts import assert_identical, state_of
from curved import (
    Gpt,
    Residual,
    as_in_float64,
    coordinates_of,
    data_of,
    dense_hessian,
    flat,
    objective_of,
    trained,
)
from losses import classification
from networks import Sparse, texts
from torch import Tensor, nn

from smoothdiag import Objective, objective, vectors
from smoothdiag.measure.curvature import hvp, trace
from smoothdiag.measure.curvature.guards import autocast_off
from smoothdiag.measure.loss.selftest import LOSS_SCALE

RUNGS = ("retained", "rebuilt", "central", "one_sided")
TOLERANCES = {
    torch.float64: {"retained": 1e-9, "rebuilt": 1e-9, "central": 1e-8, "one_sided": 1e-6},
    torch.float32: {"retained": 1e-5, "rebuilt": 1e-5, "central": 2e-3, "one_sided": 1e-2},
}
"""Largest ||Hv - (Hv)*|| / ||(Hv)*|| along the gradient, along random directions and along the top eigenvector."""

MAKE = partial(Residual)
WEIGHTS = (0.5, 2.0, None)


def parts() -> list[tuple[Tensor, Tensor]]:
    """Returns micro-batches of different sizes."""
    inputs, targets = data_of(Residual)
    return [(inputs[i:j], targets[i:j]) for i, j in ((0, 3), (3, 8), (8, 12))]


def model_of(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng([]):
        model = MAKE()
    model.load_state_dict(trained(MAKE))
    return model.to(dtype)


def weighted(model: nn.Module, dtype: torch.dtype) -> Objective:
    """Returns half the first loss, twice the second and the third as it is, added up."""
    plain = objective_of(model, classification, *((x.to(dtype), y) for x, y in parts()), reduction="sum")
    plain._micro_batches = [replace(m, weight=w) for m, w in zip(plain._micro_batches, WEIGHTS, strict=True)]
    return plain


@lru_cache
def dense_of(*, is_weighted: bool, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Returns the dense Hessian and the gradient of the twin, with all parameters shifted."""
    model = as_in_float64(model_of(torch.float32))
    parameters = coordinates_of(model)
    with torch.no_grad():
        for parameter in parameters:
            parameter += shift
    batches = [(x.double(), y) for x, y in (parts() if is_weighted else [data_of(Residual)])]

    def loss() -> Tensor:
        weights = (0.5, 2.0, 1.0) if is_weighted else (1.0,)
        return sum(w * classification(model, batch) for w, batch in zip(weights, batches, strict=True))

    hessian = dense_hessian(loss, parameters)
    return hessian, flat(torch.autograd.grad(loss(), parameters))


def directions(hessian: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(5)
    top = torch.linalg.eigh(hessian)[1][:, -1]
    return {"gradient": gradient, "top": top, "random": torch.randn(len(gradient), generator=source).double() * 1e3}


def like(direction: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    pieces = torch.split(direction, [p.numel() for p in parameters])
    return [x.view(p.shape).to(p.dtype) for x, p in zip(pieces, parameters, strict=True)]


def distance(found: list[Tensor], wanted: Tensor) -> float:
    return float((flat(found) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("is_weighted", [False, True], ids=["one", "weighted"])
def test_products_are_those_of_the_dense_hessian(rung, dtype, is_weighted, record_property) -> None:
    model = model_of(dtype)
    inputs, targets = data_of(Residual)
    objective = objective_of(model, classification, (inputs.to(dtype), targets))
    if is_weighted:
        objective = weighted(model, dtype)
    hessian, gradient = dense_of(is_weighted=is_weighted)
    errors = {}
    with hvp(objective, backend=rung) as product:
        for name, v in directions(hessian, gradient).items():
            errors[name] = distance(product(like(v, objective.parameters)), hessian @ v)
        assert product.num_hvps == 3
        # Inside, the present values of the parameters are those of the point.
        for found in (objective.evaluate().gradient, product.gradient):
            assert distance(found, gradient) < 1e-5
    record_property("errors", {name: f"{e:.0e}" for name, e in errors.items()})
    assert max(errors.values()) < TOLERANCES[dtype][rung], errors


@pytest.mark.parametrize("rung", RUNGS)
def test_independent_products_are_those_of_one_vector_at_a_time(rung) -> None:
    objective = weighted(model_of(torch.float64), torch.float64)
    hessian, _ = dense_of(is_weighted=True)
    taken = []

    def drawn() -> Iterator[list[Tensor]]:
        for seed in range(5):
            taken.append(vectors.random_like(objective.parameters, seed=seed))
            yield taken[-1]

    before = state_of(objective.model)
    with hvp(objective, backend=rung) as product:
        found = []
        for i, one in enumerate(product.each(drawn(), block=2)):
            assert len(taken) == min(5, i + 1 + (rung == "rebuilt" and i % 2 == 0))
            objective.evaluate([x + 1 for x in objective.parameters])  # what happens in between changes nothing
            found.append(one)
        assert product.num_hvps == 5
        assert objective.num_reverse == {"retained": 1 + 10, "rebuilt": 3 + 10}.get(rung, 0)
    with hvp(objective, backend=rung) as product:
        alone = [product(v) for v in taken]
        assert list(product.each([])) == []
        with pytest.raises(ValueError, match="Parameter `block` should"):
            product.each([], block=0)
        with pytest.raises(ValueError, match="Parameter `v` should"):
            list(product.each([taken[0][:1]]))
        left = product.each(taken)
        next(left)
    with pytest.raises(RuntimeError, match="closed"):
        list(left)
    for one, single, v in zip(found, alone, taken, strict=True):
        torch.testing.assert_close(one, single, rtol=0, atol=0)
        assert distance(one, hessian @ flat(v)) < TOLERANCES[torch.float64][rung]
    assert_identical(state_of(objective.model), before)


def test_the_trace_of_a_mean_over_batches_is_the_same_in_blocks() -> None:
    """The Hessian of the mean of (x'w - y)^2 is 2 X'X / n."""
    source = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 6, generator=source).double(), torch.randn(n, 1, generator=source)) for n in (4, 9)]
    model = nn.Sequential(nn.Linear(6, 1, bias=False).double(), nn.Dropout(0.0))
    loss = objective(model, lambda m, batch: (m(batch[0]) - batch[1]).square().mean(), batches)
    exact = sum(2 * float(x.square().sum()) / len(x) for x, _ in batches) / 2
    with hvp(loss, backend="rebuilt") as hessian:
        whole = trace(hessian, hessian.point, num_products=18, seed=5)  # other signs may be dependent
        built = loss.num_reverse
        parts = [trace(hessian, hessian.point, num_products=12, block=block) for block in (1, 3, 50)]
        with pytest.raises(ValueError, match="Parameter `block` should"):
            trace(hessian, hessian.point, block=0)
    assert (whole.value, whole.standard_error) == (pytest.approx(exact, rel=1e-12), 0)
    assert built == 2 * 12 + 4  # two blocks of vectors, then two of the basis
    assert parts[0] == parts[1] == parts[2]
    assert parts[0].num_products == 12
    assert abs(parts[0].value - exact) < 4 * parts[0].standard_error


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_evaluations_between_products_do_not_move_the_point(rung, training) -> None:
    model = model_of(torch.float64)
    model.norm.train(training), model.middle_norm.train(training)
    inputs, targets = data_of(Residual)
    objective = objective_of(model, classification, (inputs.double(), targets))
    here = objective.point()
    point, away = (vectors.add_scaled(here, [torch.ones_like(x) for x in here], t) for t in (0.05, 0.4))
    v = vectors.random_like(here, seed=1)
    before = state_of(model)
    with hvp(objective, point, backend=rung) as product:
        alone = [product(v), product(v)]
        gradient = product.gradient
    with hvp(objective, point, backend=rung) as product:
        assert vectors.norm(vectors.sub(objective.evaluate(away).gradient, gradient)) > 0.1 * vectors.norm(gradient)
        found = [product(v)]
        objective.evaluate(away), objective.value(here)
        with hvp(objective, away, backend=rung) as other:
            elsewhere = other(v)
            found.append(product(v))
            between = other(v)
        found.append(product(v))
        assert distance(product.gradient, flat(gradient)) < 1e-12
    tolerance = TOLERANCES[torch.float64][rung]
    for again in found:
        assert distance(again, flat(alone[0])) < 10 * tolerance  # the radius is not the same
    assert distance(between, flat(elsewhere)) < tolerance
    assert distance(elsewhere, flat(alone[0])) > 0.1
    assert_identical(state_of(model), before)


@pytest.mark.parametrize("rung", RUNGS)
def test_products_are_linear_and_zero_for_zero(rung) -> None:
    objective = objective_of(model_of(torch.float32), classification, data_of(Residual))
    point = objective.point()
    v = vectors.random_like(point, seed=1)
    with hvp(objective, backend=rung) as product:
        base = product(v)
        for factor in (-1.0, 1e-6, 1e6):
            scaled = product([factor * x for x in v])
            assert distance(scaled, factor * flat(base)) < 2 * TOLERANCES[torch.float32][rung]
        zero = product([0 * x for x in v])
        assert float(vectors.norm(zero)) == 0
        assert [x.shape for x in zero] == [x.shape for x in point]
        exact = rung in ("retained", "rebuilt")
        assert (product.radius is None) == exact
        if exact:
            with pytest.raises(RuntimeError, match="have no radius"):
                product.finer(v)
        else:
            product(v)
            assert distance(product.finer(v), flat(base)) < 4 * TOLERANCES[torch.float32][rung]
            assert float(vectors.norm(product.finer(zero))) == 0
            assert 0 < product.radius < 0.1 * float(vectors.norm(point))


def half_autocast(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        logits = model(batch[0])
    return 1e-5 * classification(lambda _: logits.float(), batch)


@pytest.mark.thorough
def test_autocast_that_is_kept_multiplies_with_the_scale_of_float16(record_property) -> None:
    """The gradients of this loss underflow in float16 unless the loss is scaled."""
    make = partial(Gpt)
    with torch.random.fork_rng([]):
        model, twin = make(), make()
    for each in (model, twin):
        each.load_state_dict(trained(make))
    inputs, targets = data_of(Gpt)
    twin = as_in_float64(twin)
    wanted = 1e-5 * dense_hessian(lambda: classification(twin, (inputs, targets)), coordinates_of(twin))
    errors = {}
    for rung in ("auto", *RUNGS):
        objective = objective_of(model, half_autocast, (inputs, targets))
        before = state_of(model)
        with hvp(objective, backend=rung, autocast=True) as product:
            v = vectors.mixed(product.gradient, seed=0)
            errors[rung] = distance(product(v), wanted @ flat(v))
        assert objective.loss_scale == LOSS_SCALE
        assert_identical(state_of(model), before)
        if rung == "auto":
            record_property("chosen", f"{product.backend}: {product.reason}")
    record_property("errors", {name: f"{e:.0e}" for name, e in errors.items()})
    tolerances = {
        "central": 0.1,
        "one_sided": 0.6,
    }  # along the gradient; a way as long as float16 needs is not straight
    assert all(e < tolerances.get(name, 0.02) for name, e in errors.items()), errors


def test_autocast_that_is_kept_is_that_of_the_loss() -> None:
    """With autocast in force the products are not those without, but of the order of rounding away."""
    model = Gpt()
    model.load_state_dict(trained(partial(Gpt)))
    objective = objective_of(model, half_autocast, data_of(Gpt))
    v = vectors.random_like(objective.point(), seed=1)
    found = []
    for autocast in (True, False):
        with hvp(objective, backend="retained", autocast=autocast) as product:
            found.append(flat(product(v)))
    assert 1e-5 < (found[0] - found[1]).norm() / found[1].norm() < 0.05


def test_sparse_gradients_and_several_micro_batches() -> None:
    model = Sparse()
    batches = texts(2, 4)
    objective = objective_of(model, classification, *batches)
    v = vectors.random_like(objective.point(), seed=1)
    found = {}
    for rung in ("auto", "rebuilt", "central"):
        with hvp(objective, backend=rung) as product:
            found[rung] = flat(product(v))
            assert product.backend == ("rebuilt" if rung == "auto" else rung)
    torch.testing.assert_close(found["auto"], found["rebuilt"], rtol=0, atol=0)
    assert (found["rebuilt"] - found["central"]).norm() < 2e-3 * found["central"].norm()


@pytest.mark.parametrize("rung", RUNGS)
def test_what_surrounds_and_what_fails_leaves_no_trace(rung) -> None:
    objective = objective_of(model_of(torch.float32), classification, data_of(Residual))
    v = vectors.random_like(objective.point(), seed=1)
    before = state_of(objective.model)
    enter = torch.autocast.__enter__
    with hvp(objective, backend=rung) as product:
        wanted = flat(product(v))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with hvp(objective, backend=rung) as product:
            assert distance(product(v), wanted) == 0
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    with pytest.raises(AttributeError), hvp(objective, backend=rung) as product:
        product(product(v)).not_an_attribute  # noqa: B018
    assert_identical(state_of(objective.model), before)
    assert torch.autocast.__enter__ is enter
    assert torch.backends.cuda.flash_sdp_enabled()
    assert str(torch._dynamo.eval_frame._stance.stance) == "default"


def test_unknown_backends_are_refused() -> None:
    objective = objective_of(model_of(torch.float32), classification, data_of(Residual))
    with pytest.raises(ValueError, match="Parameter `backend` should be one of"), hvp(objective, backend="forward"):
        pass


def test_a_closed_hessian_multiplies_no_more() -> None:
    model = nn.Linear(3, 2)
    loss = objective(model, lambda m, x: m(x).square().mean(), [torch.randn(4, 3)])
    with hvp(loss) as hessian:
        product = hessian(hessian.gradient)
        with pytest.raises(ValueError, match="Parameter `v` should"):
            hessian(product[:1])
    with pytest.raises(RuntimeError, match="closed"):
        hessian(product)


@pytest.mark.parametrize("backend", ["retained", "rebuilt", "central"])
def test_buffers_are_those_of_the_moment_and_stay_with_the_graph(backend) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2).double()
            self.register_buffer("scale", torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            self.scale.mul_(0.5)
            return torch.tanh(y * self.scale)

    model, x = Scaled(), torch.randn(8, 3).double()
    loss = objective(model, lambda m, x: m(x).square().mean(), [x])
    model.scale.fill_(3.0)
    twin = [p.detach().clone().requires_grad_() for p in model.inner.parameters()]
    value = torch.tanh(nn.functional.linear(x, *twin) * 1.5).square().mean()
    gradient = torch.autograd.grad(value, twin, create_graph=True)
    v = [torch.randn_like(p) for p in twin]
    expected = torch.autograd.grad(gradient, twin, v)
    with hvp(loss, backend=backend) as hessian:
        for _ in range(2):
            for found, wanted in zip(hessian(v), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    assert float(model.scale) == 3.0


def narrow() -> bool:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return nn.Linear(3, 2)(torch.randn(4, 3)).dtype == torch.bfloat16


def test_autocast_is_off_for_the_thread_that_measures_alone() -> None:
    enter, opened, close = torch.autocast.__enter__, threading.Event(), threading.Event()
    found = {}

    def measure() -> None:
        with autocast_off(["cpu"]):
            found["measuring"] = narrow()
            opened.set()
            close.wait(600)

    thread = threading.Thread(target=measure)
    thread.start()
    opened.wait(600)
    found["training"] = narrow()
    with autocast_off(["cpu"]):
        close.set()
        thread.join()
        found["after the other"] = narrow()
    found["in the end"] = narrow()
    assert found == {"measuring": False, "training": True, "after the other": False, "in the end": True}
    assert torch.autocast.__enter__ is enter

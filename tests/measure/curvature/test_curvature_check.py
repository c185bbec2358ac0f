"""measure.curvature.check: products that leave terms out are found, and healthy models keep the fast way."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from asserts import assert_identical, state_of
from curved import Silu, coordinates_of, dense_hessian, flat, objective_of
from losses import classification
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag import Objective
from smoothdiag.measure.curvature import Choice, choose, hvp
from smoothdiag.measure.curvature.spectrum import lanczos

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


class Head(torch.autograd.Function):
    """Cross-entropy that computes the gradient of the logits ahead, as fused heads do, and so hides that it varies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward((logits.softmax(-1) - F.one_hot(targets, logits.shape[-1])) / len(targets))
        return F.cross_entropy(logits, targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class HeadWithoutGrad(Head):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            return Head.backward(ctx, grad)


def detached(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return Head.apply(model(batch[0]), batch[1])


def without_grad(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return HeadWithoutGrad.apply(model(batch[0]), batch[1])


class Mlp(nn.Module):
    def __init__(self, first: Callable[..., Tensor] = torch.tanh, last: Callable[..., Tensor] = torch.tanh) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.last(self.b(self.first(self.a(x)))))


class Branched(Mlp):
    """With a branch two wide, which counts for a tenth: 2% of the parameters are behind the function."""

    def __init__(self, function: Callable[..., Tensor] = Silu.apply) -> None:
        super().__init__()
        self.down, self.up, self.function = nn.Linear(6, 2), nn.Linear(2, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * self.up(self.function(self.down(x)))


class Extended(Mlp):
    """With parameters that the loss is linear in, and others that it does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Parameter(torch.randn(3)), nn.Linear(3, 3)


def rough(*, norm: bool = False) -> nn.Module:
    """Images (n, 1, 8, 8) -> logits, by ReLU and max-pooling: the gradient jumps everywhere."""
    norms = [nn.BatchNorm2d(8) if norm else nn.Identity() for _ in range(2)]
    first = [nn.Conv2d(1, 8, 3, padding=1), norms[0], nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(8, 8, 3, padding=1), norms[1], nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32, 5))


def batch_of(model: nn.Module) -> tuple[Tensor, Tensor]:
    return (
        (torch.randn(16, 1, 8, 8), torch.randint(5, (16,)))
        if isinstance(model, nn.Sequential)
        else (torch.randn(32, 6), torch.randint(4, (32,)))
    )


def objective_after(
    make: Callable[[], nn.Module],
    loss_fn: Callable[..., Tensor] = classification,
    *,
    dtype: torch.dtype = torch.float32,
    steps: int = 30,
    seed: int = 0,
    hook: Callable[[nn.Module], Any] = lambda model: None,
) -> Objective:
    """Returns the objective of a model after some training on the true cross-entropy."""
    torch.manual_seed(seed)
    model = make().to(dtype)
    inputs, targets = batch_of(model)
    batch = (inputs.to(dtype), targets)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        classification(model, batch).backward()
        optimizer.step()
    hook(model)
    return objective_of(model, loss_fn, batch)


def chosen(objective: Objective) -> Choice:
    return choose(objective, objective.point(), autocast=False)


def beside(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a healthy network, and a little of that of another one whose head is detached."""
    return classification(model, batch) + 0.1 * Head.apply(model.up(model.down(batch[0])), batch[1])


def scale_all(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        parameter.register_hook(lambda g: factor * g)


PARTIAL = {
    "once_differentiable, last": (lambda: Mlp(last=Silu.apply), classification, {}),
    "once_differentiable, first": (lambda: Mlp(first=Silu.apply), classification, {}),
    "detached head": (Mlp, detached, {}),
    "head under no_grad": (Mlp, without_grad, {}),
    "detached head on a linear model": (lambda: nn.Linear(6, 4), detached, {}),
    "small branch": (Branched, classification, {}),
    "small part beside": (lambda: Branched(torch.tanh), beside, {}),
    "hooks on all": (Mlp, classification, {"hook": lambda m: scale_all(m, 2.0)}),
    "hooks by a few percent": (Mlp, classification, {"hook": lambda m: scale_all(m, 1.05)}),
    "hook on one": (Mlp, classification, {"hook": lambda m: m.b.bias.register_hook(lambda g: 2 * g)}),
    "detached head, kinks": (rough, detached, {}),
    "detached head, kinks, fitted": (rough, detached, {"steps": 150}),
    "detached head, kinks, batch norm": (lambda: rough(norm=True), detached, {"steps": 150}),
}


@FLOATS
@pytest.mark.parametrize("name", PARTIAL)
def test_products_that_leave_terms_out_are_not_taken(name, dtype, record_property) -> None:
    make, loss_fn, options = PARTIAL[name]
    choice = chosen(objective_after(make, loss_fn, dtype=dtype, **options))
    record_property("reason", choice.reason)
    assert choice.backend == "central"
    assert choice.reason.startswith("retained: ")
    assert any(said in choice.reason for said in ("not symmetric", "from a difference of gradients"))


def regression(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - F.one_hot(batch[1], 4)).square().mean()


def linear(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0]).mean()


def extended(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return classification(model, batch) + (model.linear * torch.tensor([1.0, 2.0, 3.0]).to(batch[0])).sum()


def planted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    weight = torch.arange(24.0).view(4, 6).to(batch[0]) / 10
    return (model(batch[0]) - batch[0] @ weight.T).square().mean()


def solve(model: nn.Module) -> None:
    with torch.no_grad():
        model.weight.copy_(torch.arange(24.0).view(4, 6) / 10), model.bias.zero_()


def empty(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


HEALTHY = {
    "smooth": (Mlp, classification, {}),
    "smooth, fitted": (Mlp, classification, {"steps": 1000}),
    "kinks": (lambda: Mlp(torch.relu, torch.relu), classification, {"seed": 1}),
    "kinks, fitted": (lambda: Mlp(torch.relu, torch.relu), classification, {"steps": 1000}),
    "kinks, pooling": (rough, classification, {"steps": 150, "seed": 1}),
    "kinks, pooling, batch norm, new": (lambda: rough(norm=True), classification, {"steps": 0, "seed": 2}),
    "kinks, pooling, batch norm, fitted": (lambda: rough(norm=True), classification, {"steps": 150}),
    "linear in some, without others": (Extended, extended, {}),
    "linear loss of a network": (Mlp, linear, {}),
    "linear loss, no curvature": (lambda: nn.Linear(6, 4), linear, {}),
    "quadratic": (lambda: nn.Linear(6, 4), regression, {}),
    "quadratic, solved": (lambda: nn.Linear(6, 4), planted, {"hook": solve}),
    "all zero": (Mlp, regression, {"hook": empty}),
}


@pytest.mark.thorough
@FLOATS
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_models_keep_exact_products(name, dtype, record_property) -> None:
    make, loss_fn, options = HEALTHY[name]
    choice = chosen(objective_after(make, loss_fn, dtype=dtype, **options))
    record_property("reason", choice.reason)
    assert choice.backend == "retained", choice.reason


def test_partial_products_would_be_plainly_wrong() -> None:
    """Otherwise it would not matter which way is chosen; one of them is symmetric."""
    for loss_fn, is_symmetric in ((detached, True), (classification, False)):
        make = Mlp if loss_fn is detached else lambda: Mlp(last=Silu.apply)
        objective = objective_after(make, loss_fn, dtype=torch.float64)
        found = {}
        for backend in ("retained", "central"):
            with hvp(objective, backend=backend) as hessian:
                found[backend] = lanczos(hessian, hessian.gradient).norm
        assert abs(found["retained"] / found["central"] - 1) > 0.1
        assert ("not symmetric" in chosen(objective).reason) != is_symmetric


def test_kinks_are_settled_in_float64_which_leaves_no_trace() -> None:
    objective = objective_after(lambda: rough(norm=True), steps=150)
    model = objective.model
    batch = batch_of(model)
    loss = classification(model, batch)  # its graph is alive while the measurement is made, as in a training loop
    loss.backward()
    before, dtypes = state_of(model), [t.dtype for t in (*model.parameters(), *model.buffers())]
    places = [t.data_ptr() for t in model.parameters()]
    evaluated = objective.num_grads
    choice = chosen(objective)
    assert choice.backend == "retained"
    assert "in float64" in choice.reason
    assert_identical(state_of(model), before)
    assert [t.dtype for t in (*model.parameters(), *model.buffers())] == dtypes
    assert [t.data_ptr() for t in model.parameters()] == places
    assert 8 < objective.num_grads - evaluated < 24
    assert float(loss.detach()) > 0


@pytest.mark.parametrize("steps", [0, 30])
def test_models_that_do_not_run_in_float64_are_judged_without(steps) -> None:
    def narrow(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if batch[0].dtype == torch.float64:
            raise RuntimeError("only float32 is supported")
        return detached(model, batch)

    objective = objective_after(lambda: rough(norm=True), narrow, steps=steps, seed=1)
    before = state_of(objective.model)
    choice = chosen(objective)
    assert choice.backend == "central"
    assert "float64" not in choice.reason
    assert "of the curvature along the gradient" in choice.reason
    assert_identical(state_of(objective.model), before)
    assert {p.dtype for p in objective.parameters} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("once_differentiable, last", lambda: Mlp(last=F.silu)),
        ("detached head", Mlp),
        ("small branch", lambda: Branched(F.silu)),
    ],
)
def test_the_way_below_gives_the_whole_hessian(name, plain) -> None:
    make, loss_fn, _ = PARTIAL[name]
    objective = objective_after(make, loss_fn)
    (micro,) = objective._micro_batches
    with hvp(objective) as hessian:
        assert hessian.backend == "central"
        found = lanczos(hessian, hessian.gradient)
        vector = flat(found.pairs[0].vector)
    twin = plain()
    twin.load_state_dict(objective.model.state_dict())
    twin = twin.double()
    batch = (micro.batch[0].double(), micro.batch[1])
    dense = dense_hessian(lambda: classification(twin, batch), coordinates_of(twin))
    values, vectors = np.linalg.eigh(dense.numpy())
    top = int(np.abs(values).argmax())
    assert found.norm == pytest.approx(abs(values[top]), rel=2e-3)
    assert abs(float(vector @ torch.from_numpy(vectors[:, top].copy()))) > 0.99

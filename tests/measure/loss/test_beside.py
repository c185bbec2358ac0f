"""measure.loss.beside: modules that a loss calls beside the model end as they do without a probe."""

from collections.abc import Callable
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of
from networks import mlp
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag import AutoClip, Probe, SmoothdiagWarning, StepRule, every
from smoothdiag.measure.loss.beside import modules_beside

Loss = Callable[[nn.Module, Tensor], Tensor]


class Centred(nn.Module):
    """A loss that keeps a running mean of what it gets, as that of DINO."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, y: Tensor) -> Tensor:
        loss = F.smooth_l1_loss(self.norm(y) - self.centre, torch.ones_like(y))
        self.centre = 0.9 * self.centre + 0.1 * y.detach().mean(0)
        return loss


def with_other(model: nn.Module, batch: Tensor, other: nn.Module) -> Tensor:
    return other(model(batch))


def by_closure(other: nn.Module) -> Loss:
    return lambda model, batch: with_other(model, batch, other)


def by_default(other: nn.Module) -> Loss:
    def loss_fn(model: nn.Module, batch: Tensor, other: nn.Module = other) -> Tensor:
        return with_other(model, batch, other)

    return loss_fn


def by_helper(other: nn.Module) -> Loss:
    def helper(y: Tensor) -> Tensor:
        return other(y)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return sum((helper(model(part)) for part in (batch,)), start=torch.zeros(()))

    return loss_fn


def by_method(other: nn.Module) -> Loss:
    class Trainer:
        def __init__(self) -> None:
            self.networks = SimpleNamespace(other=other)

        def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            return with_other(model, batch, self.networks.other)

    return Trainer().loss


def by_callable(other: nn.Module) -> Loss:
    class Criterion:
        def __init__(self) -> None:
            self.parts = {"other": [other]}

        def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
            return with_other(model, batch, self.parts["other"][0])

    return Criterion()


def by_global(other: nn.Module) -> Loss:
    space: dict[str, Any] = {"other": other}
    exec("def loss_fn(model, batch):\n    return other(model(batch))", space)
    loss_fn: Loss = space["loss_fn"]
    return loss_fn


def by_decorator(other: nn.Module) -> Loss:
    inner = by_closure(other)

    @wraps(inner)
    def loss_fn(*given: Any) -> Tensor:
        return inner(*given)

    return loss_fn


WAYS: dict[str, Callable[[nn.Module], Loss]] = {
    "closure": by_closure,
    "default": by_default,
    "helper": by_helper,
    "method": by_method,
    "callable object": by_callable,
    "global name": by_global,
    "decorated": by_decorator,
    "partial": lambda other: partial(with_other, other=other),
}


def _trained(way: str, attach: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, other = mlp(6, 4, 4), Centred()
    loss_fn = WAYS[way](other)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    probe = Probe(model, optimizer, loss_fn, schedule=every(1)) if attach else None
    if probe and attach == "AutoClip":
        AutoClip(optimizer, probe, rule=StepRule(multiple=None, relative=1e12))
    for _ in range(4):
        batch = torch.randn(8, 6)
        if probe:
            probe.observe(batch)
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    if probe:
        assert {row["status"] for row in probe.trace} <= {"ok", "saturated", "kink_limited"}
    return state_of(model, optimizer) | {f"other {name}": value for name, value in state_of(other).items()}


@pytest.mark.filterwarnings("error::smoothdiag.SmoothdiagWarning")
@pytest.mark.parametrize("attach", ["Probe", "AutoClip"])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_loss_reaches_is_put_back(way, attach) -> None:
    assert_identical(_trained(way, attach), _trained(way, ""))


class Absent:
    """A stand-in for an object that is not there."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError("outside of a request")


def test_what_cannot_be_looked_at_is_left_out() -> None:
    absent, other = Absent(), Centred()

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return other(batch) if absent is not None else batch.sum()

    assert [type(module) for module in modules_beside(nn.Linear(1, 1), loss_fn)] == [Centred, nn.BatchNorm1d]


def adversary(*, moves: bool) -> Probe:
    """Trains a generator against a critic outside the model."""
    torch.manual_seed(0)
    generator, critic = mlp(3, 4), mlp(4, 8, 1)
    optimizer, other = (torch.optim.SGD(module.parameters(), lr=0.1) for module in (generator, critic))
    probe = Probe(generator, optimizer, lambda model, z: critic(model(z)).mean(), schedule=every(1))
    for z in probe.watch(torch.randn(4, 8, 3)):
        optimizer.zero_grad()
        critic(generator(z)).mean().backward()
        optimizer.step()
        if moves:
            other.step()
        other.zero_grad()
    return probe


def test_what_a_loss_reaches_outside_the_model_is_named_once_it_moves() -> None:
    said = r"on 4 trainable parameters outside `model` \(module Sequential\), .* as in Probe\(model=\[G, D\]"
    with pytest.warns(SmoothdiagWarning, match=said) as caught:
        adversary(moves=True)
    assert len(caught) == 1
    adversary(moves=False)

"""measure.loss.delivery, measure.loss.sweeps: gradients taken within backward are those that autograd leaves."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from asserts import assert_identical, state_of
from networks import Point
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smoothdiag import PathSmoothness, Probe, every
from smoothdiag.measure.loss.batches import MicroBatch, RandomState
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.measure.loss.state import ModuleState
from smoothdiag.packing import SMALL

WIDTH = math.isqrt(SMALL)
"""Width of a square layer that is taken within backward."""


class Shared(nn.Module):
    """A layer that two checkpoints run, each with a backward pass of its own inside backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(lambda y: torch.tanh(self.layer(y)), x, use_reentrant=True)
        return self.head(x)


class Places(nn.Module):
    """Parameters of all kinds: large and small ones, with and without a gradient, tables with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH, sparse=True)
        self.short = nn.Embedding(5, WIDTH, sparse=True)
        self.idle, self.small = (nn.Parameter(torch.randn(n)) for n in (SMALL, 7))
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.table(x) * self.short(x % 5))).sum(-1)


def objective(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: Sequence[Any], weights: Sequence[float] | None = None
) -> tuple[Objective, ModuleState]:
    state = ModuleState(model, loss_fn)
    micro = [
        MicroBatch(batch, RandomState.capture(), weight=None if weights is None else weights[i])
        for i, batch in enumerate(batches)
    ]
    return Objective(model, loss_fn, micro, list(model.parameters()), state=state), state


def autograd(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in model.parameters()]
    model.zero_grad()
    return [g.detach() for g in found]


def squared(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_gradient_that_arrives_in_two_parts_is_whole() -> None:
    model, x = Shared(), torch.randn(4, WIDTH)
    exact = autograd(model, squared(model, x))
    loss, state = objective(model, squared, [x])
    assert state.hands_on
    assert equal(loss.evaluate().gradient, exact)
    assert not state.hands_on  # noticed, and known from now on
    before = loss.num_grads
    assert equal(loss.evaluate().gradient, exact)
    assert (before, loss.num_grads) == (2, 3)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_loss_may_read_gradients_of_a_backward_pass_of_its_own() -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), torch.randn(4, WIDTH)

    def penalised(model: nn.Module, x: Tensor) -> Tensor:
        value = squared(model, x)
        value.backward(create_graph=True)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for p in model.parameters():
            p.grad = None
        return value + sum(g.square().sum() for g in gradients)

    loss, state = objective(model, penalised, [x])
    assert equal(loss.evaluate().gradient, autograd(model, penalised(model, x)))
    assert state.hands_on


def test_ordinary_checkpoints_do_not_cost_a_second_pass() -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), torch.randn(4, WIDTH, requires_grad=True)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=True).square().mean()

    loss, state = objective(model, loss_fn, [x])
    assert equal(loss.evaluate().gradient, autograd(model, loss_fn(model, x)))
    assert state.hands_on
    assert loss.num_grads == 1


def test_training_goes_on_unchanged_where_gradients_arrive_in_parts() -> None:
    states, rows = [], []
    for probed in (False, True):
        torch.manual_seed(0)
        model = Shared()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        probe = Probe(model, optimizer, squared, estimators=[PathSmoothness()], schedule=every(1)) if probed else None
        for _ in range(3):
            x = torch.randn(4, WIDTH)
            if probe is not None:
                probe.observe(x)
            optimizer.zero_grad()
            squared(model, x).backward()
            optimizer.step()
        states.append(state_of(model, optimizer))
        rows += [] if probe is None else list(probe.trace)
    assert_identical(*states)
    assert {row["status"] for row in rows} == {"ok"}
    # The pass that was lost is counted where it happened, and only there.
    assert [row["num_grads"] for row in rows] == [2, 3, 3]


def test_gradients_that_share_memory_stay_right() -> None:
    # The gradient of a sum goes to both of its terms, in the same memory.
    model = nn.ModuleList([Point(torch.randn(WIDTH, WIDTH)), Point(torch.randn(SMALL)), Point(torch.randn(3))])

    def loss_fn(model: nn.ModuleList, batch: Tensor) -> Tensor:
        x, y, z = (part.x for part in model)
        return ((x.view(-1) + y.view(-1)) * batch).sum() + z.square().sum()

    batches = [torch.randn(SMALL) for _ in range(3)]
    loss, _ = objective(model, loss_fn, batches)
    for _ in range(2):
        found = loss.evaluate()
        exact = torch.stack(batches).double().mean(0)
        torch.testing.assert_close(found.gradient[0].view(-1).double(), exact, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.gradient[0].view(-1), found.gradient[1])
        torch.testing.assert_close(found.gradient[2], 2 * model[2].x.detach())


def test_what_has_no_gradient_gets_zeros_and_what_is_sparse_gets_all() -> None:
    model, x = Places(), torch.randint(WIDTH, (9,))
    exact = autograd(model, squared(model, x))
    loss, _ = objective(model, squared, [x])
    found = loss.evaluate().gradient
    assert equal(found, exact)
    assert all(g.layout is torch.strided and not g.requires_grad for g in found)
    named = dict(zip((name for name, _ in model.named_parameters()), found, strict=True))
    assert not named["idle"].any()
    assert not named["small"].any()
    assert named["table.weight"].any()
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_taken_after_the_evaluation() -> None:
    model, x = Places(), torch.randint(WIDTH, (9,))
    loss, _ = objective(model, squared, [x])
    loss.evaluate()
    squared(model, x).backward()
    grads = {name: p.grad is not None for name, p in model.named_parameters()}
    assert grads == {name: name not in ("idle", "small") for name in grads}
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_hooks_are_gone_after_an_error() -> None:
    model, x = Places(), torch.randint(WIDTH, (9,))

    def failing(model: nn.Module, x: Tensor) -> Tensor:
        loss = squared(model, x)
        if failing.fails:
            loss.register_hook(lambda g: 1 / 0)
        return loss

    loss, state = objective(model, failing, [x])
    failing.fails = True
    with pytest.raises(ZeroDivisionError):
        loss.evaluate()
    failing.fails = False
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert equal(loss.evaluate().gradient, autograd(model, squared(model, x)))
    assert state.hands_on


@pytest.mark.parametrize("weights", [None, (0.5, 0.25, 0.125, 0.125)])
def test_micro_batches_add_up_as_in_float64(weights: tuple[float, ...] | None) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
    batches = [torch.randn(4, WIDTH) for _ in range(4)]
    twin = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)).double()
    twin.load_state_dict(model.state_dict())
    shares = weights or [0.25] * 4
    parts = [
        torch.cat([g.flatten() for g in autograd(twin, w * squared(twin, x.double()))])
        for w, x in zip(shares, batches, strict=True)
    ]
    loss, _ = objective(model, squared, batches, weights)
    found = loss.evaluate()
    exact, total = torch.stack(parts), sum(parts)
    gradient = torch.cat([g.flatten() for g in found.gradient]).double()
    assert float((gradient - total).norm() / total.norm()) < 1e-6
    value = sum(w * squared(twin, x.double()).item() for w, x in zip(shares, batches, strict=True))
    assert found.loss == pytest.approx(value, rel=1e-6)
    if weights is None:
        # The parts are a quarter each, so that their mean has the variance of their sum over four.
        variance = float((4 * exact).var(dim=0, correction=1).sum()) / 4
        assert found.variance == pytest.approx(variance, rel=1e-5)
    else:
        assert math.isnan(found.variance)


def test_pieces_arrive_once_each_with_their_own_tensors() -> None:
    model, x = Places(), torch.randint(WIDTH, (9,))
    exact = autograd(model, squared(model, x))
    loss, _ = objective(model, squared, [x])
    order: list[int] = []

    def take(tally: Any, k: int, found: list[Tensor]) -> None:
        order.append(k)
        assert equal(found, [exact[i] for i in tally.packing.pieces[k].indices])

    loss.sweep(None, take)
    assert sorted(order) == list(range(len(loss.packing.pieces)))
    taken_early = [k for k in order if not loss.packing.pieces[k].is_joined]
    assert order.index(taken_early[0]) == 0  # within backward, before the small ones


def test_forward_passes_alone_give_the_same_loss() -> None:
    model, x = Places(), torch.randint(WIDTH, (9,))
    loss, _ = objective(model, squared, [x, x + 1 - x % 2])
    assert loss.value() == loss.evaluate().loss
    assert loss.num_grads == 1
    assert loss.look(None).total("loss") == loss.value()

"""measure.loss.objective: the loss is the same function however often it is evaluated, and leaves no trace."""

import random

import numpy as np
import pytest
import torch
from asserts import assert_identical, state_of
from losses import cross_entropy
from networks import mlp
from torch import Tensor, nn
from torch.nn import functional as F

from smoothdiag import Objective, vectors
from smoothdiag.measure.loss.batches import MicroBatch, RandomState
from smoothdiag.measure.loss.state import ModuleState


class Noisy(nn.Module):
    """Everything that differs from call to call: dropout, batch statistics, numpy and Python random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + 0.1 * np.random.rand() + 0.1 * random.random()
        return self.last(F.dropout(torch.tanh(self.norm(self.first(x))), 0.5, self.training)) * scale


def make_batch(n: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6), torch.randint(3, (n,))


def objective_of(model: nn.Module, *batches, loss_fn=cross_entropy, buffers=None, **options) -> Objective:
    micro_batches = [MicroBatch(batch, RandomState.capture(), buffers) for batch in batches]
    return Objective(model, loss_fn, micro_batches, [p for p in model.parameters() if p.requires_grad], **options)


def test_the_same_point_gives_the_same_numbers_whatever_happened_in_between() -> None:
    model = Noisy()
    objective = objective_of(model, make_batch())
    first = objective.evaluate()
    torch.rand(7), np.random.rand(7), random.random()
    model(torch.randn(16, 6))  # moves the batch statistics
    second = objective.evaluate()
    assert first.loss == second.loss
    for a, b in zip(first.gradient, second.gradient, strict=True):
        assert torch.equal(a, b)


def test_the_replayed_gradient_is_the_training_gradient_bit_for_bit() -> None:
    model = Noisy()
    batch = make_batch()
    objective = objective_of(model, batch)
    loss = cross_entropy(model, batch)
    loss.backward()
    replayed = objective.evaluate()
    assert replayed.loss == float(loss.detach())
    for parameter, gradient in zip(model.parameters(), replayed.gradient, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_an_evaluation_elsewhere_leaves_no_trace() -> None:
    model = Noisy()
    model.last.eval()
    cross_entropy(model, make_batch()).backward()
    gradients = [p.grad for p in model.parameters()]
    objective = objective_of(model, make_batch(), make_batch())
    before = state_of(model)
    elsewhere = [x + 1 for x in objective.point()]
    objective.evaluate(elsewhere)
    objective.value(elsewhere)
    assert_identical(state_of(model), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_estimators_may_write_to_the_ends_of_a_step() -> None:
    model = nn.Sequential(nn.Linear(8, 200), nn.Linear(200, 200), nn.Linear(200, 5))
    batch = torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    loss = objective_of(model, batch, widen_half=True)
    before = state_of(model)
    with loss.isolated():
        for x in loss.end:
            x.zero_()
    assert_identical(before, state_of(model))


def test_an_error_in_the_loss_leaves_no_trace_either() -> None:
    def failing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        model.eval()
        cross_entropy(model, batch).backward()
        raise RuntimeError("out of order")

    model = Noisy()
    objective = objective_of(model, make_batch(), loss_fn=failing)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="out of order"):
        objective.evaluate([x + 1 for x in objective.point()])
    assert_identical(state_of(model), before)


def test_evaluations_start_from_the_given_buffers() -> None:
    model = Noisy().eval()  # in eval mode the statistics enter the loss
    old = ModuleState(model).snapshot(set(map(id, model.parameters())))
    batch = make_batch()
    before = objective_of(model, batch).value()
    model.norm.running_mean.add_(1.0)
    assert objective_of(model, batch, buffers=old).value() == before
    assert objective_of(model, batch).value() != before


def test_value_is_the_loss_of_evaluate() -> None:
    objective = objective_of(Noisy(), make_batch(), make_batch(5))
    assert objective.value() == objective.evaluate().loss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_add_up_as_the_loop_adds_them(reduction) -> None:
    model = nn.Linear(6, 3).double()
    batches = [(x.double(), y) for x, y in (make_batch(4), make_batch(12))]
    evaluation = objective_of(model, *batches, reduction=reduction).evaluate()
    losses = torch.stack([cross_entropy(model, batch) for batch in batches])
    loss = losses.mean() if reduction == "mean" else losses.sum()
    assert evaluation.loss == pytest.approx(float(loss), rel=1e-14)
    for a, b in zip(evaluation.gradient, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)


def test_shared_frozen_unused_and_sparse_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4, sparse=True)
            self.shared, self.frozen, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.again = self.shared
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.frozen(self.shared(self.embed(x))))

    model = Odd()
    objective = objective_of(model, torch.tensor([0, 0, 3]), loss_fn=lambda m, x: m(x).square().mean())
    assert len(objective.parameters) == 5
    gradient = dict(zip(["embed", "w", "b", "unused w", "unused b"], objective.evaluate().gradient, strict=True))
    assert not gradient["embed"].is_sparse
    assert gradient["embed"][[0, 3]].abs().sum() > 0
    assert gradient["embed"][[1, 2, 4]].abs().sum() == 0
    assert gradient["unused w"].shape == (4, 4)
    assert gradient["unused w"].abs().sum() == 0


def test_gradients_of_parameters_outside_x_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    batch = make_batch()
    cross_entropy(model, batch).backward()
    before = state_of(model)
    micro = MicroBatch(batch, RandomState.capture())
    Objective(model, cross_entropy, [micro], list(model[0].parameters())).evaluate()
    assert_identical(state_of(model), before)


def test_pending_graphs_stay_valid() -> None:
    model, batch = mlp(6, 8, 3), make_batch()
    expected = torch.autograd.grad(cross_entropy(model, batch), list(model.parameters()))
    pending = cross_entropy(model, batch)
    objective = objective_of(model, batch)
    objective.evaluate([x + 1 for x in objective.point()])
    for a, b in zip(torch.autograd.grad(pending, list(model.parameters())), expected, strict=True):
        assert torch.equal(a, b)


def test_two_points_differ_under_one_outer_autocast_region() -> None:
    model, batch = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), make_batch()
    objective = objective_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        here, there = objective.evaluate(), objective.evaluate([2 * x for x in objective.point()])
    assert here.loss != there.loss
    assert float(vectors.norm(vectors.sub(here.gradient, there.gradient))) > 0.1 * float(vectors.norm(here.gradient))


def test_gradients_are_counted() -> None:
    objective = objective_of(Noisy(), make_batch(), make_batch())
    objective.evaluate(), objective.evaluate(), objective.value()
    assert objective.num_grads == 2


@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), r"shape \(16,\)"),
        (lambda m, b: float(cross_entropy(m, b)), "float"),
        (lambda m, b: cross_entropy(m, b).detach(), "a detached tensor"),
        (lambda m, b: None, "NoneType"),
    ],
)
def test_losses_that_are_no_differentiable_scalar(loss_fn, found) -> None:
    objective = objective_of(Noisy(), make_batch(), loss_fn=loss_fn)
    with pytest.raises(ValueError, match=f"Parameter `loss_fn` should return a .* Found {found}"):
        objective.evaluate()


def test_a_loss_of_shape_one_is_a_scalar() -> None:
    objective = objective_of(Noisy(), make_batch(), loss_fn=lambda m, b: cross_entropy(m, b).reshape(1))
    assert objective.evaluate().loss > 0

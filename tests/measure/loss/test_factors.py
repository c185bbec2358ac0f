"""measure.loss.factors: how much a loss counts, read off the backward pass."""

import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smoothdiag.measure.loss.factors import Factor, backward_runs


def factors_of(combine: Callable[..., Tensor], num: int = 1) -> list[Factor]:
    """Returns what factors of losses 3x, 4x, ... show of a backward pass of their combination."""
    x = torch.ones((), requires_grad=True, dtype=torch.float64)
    losses, factors = [(3 + i) * x for i in range(num)], [Factor() for _ in range(num)]
    for loss, factor in zip(losses, factors, strict=True):
        factor.watch(loss)
    combine(*losses).backward()
    return factors


LINEAR = {
    "itself": (lambda a: a, [1.0]),
    "divided": (lambda a: a / 4, [0.25]),
    "in place": (lambda a: a.div_(4).mul_(3), [0.75]),
    "by a tensor": (lambda a: torch.tensor(7.0) * a, [7.0]),
    "cast and reshaped": (lambda a: a.half().float().reshape(1, 1).expand(2, 2)[0].squeeze().mean(), [1.0]),
    "with a constant": (lambda a: 2 - a + 5, [-1.0]),
    "a mean": (lambda a, b: torch.stack([a, b]).mean(), [0.5, 0.5]),
    "weighted": (lambda a, b: torch.dot(torch.stack([a, b]), torch.tensor([2.0, 3.0], dtype=a.dtype)), [2.0, 3.0]),
    "a sum of products": (lambda a, b: sum([0.5 * a, -a, b[None][0] * 3]), [-0.5, 3.0]),
    "many": (lambda *losses: sum(losses) / 40, [1 / 40] * 40),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_derivative_is_the_weight(name) -> None:
    combine, expected = LINEAR[name]
    found = factors_of(combine, len(expected))
    assert [factor.value.item() for factor in found] == expected
    assert {factor.bend for factor in found} == {""}


BENT = {
    "Pow": lambda a: (a - 1) ** 2,
    "Abs": lambda a: (a - 1).abs() + 1,
    "Clamp": lambda a: a.clamp(max=100) / 2,
    "Log": lambda a: a.log(),
    "Mul": lambda a: a * (a + 1),
    "Div": lambda a: torch.ones_like(a) / a,
    "Maximum": lambda a: torch.maximum(a, a / 2),
    "MseLoss": lambda a: torch.nn.functional.mse_loss(a, torch.zeros_like(a)),
}


@pytest.mark.parametrize("name", BENT)
def test_what_is_not_linear_is_named(name) -> None:
    (factor,) = factors_of(BENT[name])
    assert factor.is_known
    assert factor.bend.startswith(f"{name}Backward")


def test_a_product_with_what_depends_on_the_same_weights_is_bent_and_with_others_is_none() -> None:
    """The gradient of a product of losses is the weighted sum of theirs, but its second derivative is not."""
    for combine in (lambda a, b: a * b, lambda a, b: torch.stack([a, 2 * a]).mean() * b.sqrt(), lambda a, b: a / b):
        assert all(factor.bend for factor in factors_of(combine, 2))
    other = torch.tensor(3.0, requires_grad=True)  # a multiplier that another optimizer trains
    (factor,) = factors_of(lambda a: other.exp() * a / other)
    assert factor.bend == ""
    assert factor.value.item() == pytest.approx(math.exp(3) / 3)


def test_a_function_beside_the_loss_may_bend() -> None:
    x = torch.ones(2, requires_grad=True)
    factor, loss = Factor(), x.sum()
    factor.watch(loss)
    (loss + 0.1 * x.pow(2).sum().log()).backward()
    assert factor.value == 1
    assert factor.bend == ""


def test_only_one_of_several_results_of_a_function_is_the_loss() -> None:
    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x * 3

        @staticmethod
        def backward(ctx, a: Tensor, b: Tensor) -> Tensor:
            return 2 * a + 3 * b

    x = torch.ones((), requires_grad=True)
    logits, loss = Two.apply(x)
    factor = Factor()
    factor.watch(loss)
    (logits.exp() + loss / 2).backward()
    assert factor.value == 0.5
    assert factor.bend == ""


def test_passes_add_up_and_gradients_that_are_only_looked_at_do_not_count() -> None:
    x = torch.ones((), requires_grad=True)
    factor, loss = Factor(), 2 * x
    factor.watch(loss)
    torch.autograd.grad(loss, x, retain_graph=True)
    assert not factor.is_known
    loss.backward(retain_graph=True)
    (loss / 4).backward(retain_graph=True)
    assert factor.value == 1.25
    factor.forget()
    assert not factor.is_known
    loss.backward()
    assert factor.value == 1


def test_the_loop_s_pass_ends_although_reading_it_fails() -> None:
    x = torch.ones((), requires_grad=True)
    factor, loss = Factor(), 2 * x

    def fail() -> None:
        raise MemoryError

    factor.watch(loss, fail)
    loss.backward()
    assert x.grad == 2
    with pytest.raises(MemoryError):
        _ = factor.value


def test_the_pass_is_found_from_a_thread_of_a_device() -> None:
    x = torch.ones((), requires_grad=True)
    total = 2 * x
    found = []

    def look(gradient: Tensor) -> None:
        def elsewhere() -> None:
            found.extend(run.f_locals["t_outputs"] for run in backward_runs())

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    total.register_hook(look)
    total.backward()
    assert found == [(total,)]
    assert list(backward_runs()) == []

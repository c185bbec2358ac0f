"""measure.loss.selftest: a loop that trains on the loss of ``loss_fn`` raises no doubt, and any other does."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses import regression
from networks import mlp
from torch import Tensor, nn

from smoothdiag import Probe, every

Batch = tuple[Tensor, Tensor]
Step = Callable[[nn.Module, torch.optim.Optimizer, Any], None]
NUM_MICRO = 4


class Adapted(nn.Module):
    """Adapters in float32 on a base in bfloat16 that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 32).to(torch.bfloat16).requires_grad_(False)
        self.down, self.up, self.last = nn.Linear(6, 2), nn.Linear(2, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.base(x.to(self.base.weight.dtype)).float() + self.up(self.down(x))))


def plain() -> nn.Module:
    return mlp(6, 8, 1)


def _by(change: Callable[[nn.Module], object], factor: float = 1.0) -> Step:
    """Returns a step that backpropagates the mean loss times a factor, and changes the gradients then."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any) -> None:
        for batch in batches:
            (regression(model, batch) / len(batches) * factor).backward()
        change(model)
        optimizer.step()

    return step


def _divided(by: float) -> Callable[[nn.Module], None]:
    def divide(model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(by)

    return divide


def _replaced(by: float) -> Callable[[nn.Module], None]:
    def replace(model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad / by

    return replace


def _clipped(to: float) -> Callable[[nn.Module], object]:
    return lambda model: nn.utils.clip_grad_norm_(model.parameters(), to)


def _scaled(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=float(NUM_MICRO))
    for batch in batches:
        scaler.scale(regression(model, batch) / len(batches)).backward()
    scaler.step(optimizer)
    scaler.update()


LOOPS: dict[str, tuple[Callable[[], nn.Module], Step, str]] = {
    "mean": (plain, _by(lambda model: None), ""),
    "divided when all have come": (plain, _by(_divided(NUM_MICRO), NUM_MICRO), ""),
    "replaced by the mean": (plain, _by(_replaced(NUM_MICRO), NUM_MICRO), ""),
    "divided by the number of tokens": (plain, _by(_divided(513), 513), ""),
    "scaled by the number of micro-batches": (plain, _scaled, ""),
    "clipped": (plain, _by(_clipped(1e-3)), ""),
    "bfloat16 below adapters": (Adapted, _by(lambda model: None), ""),
    "sum": (plain, _by(lambda model: None, NUM_MICRO), 'Pass reduction="sum"'),
    "sum, clipped": (plain, _by(_clipped(1e-3), NUM_MICRO), 'Pass reduction="sum"'),
    "twice": (plain, _by(lambda model: None, 2), "2 times as long"),
    "twice, with a clip that never binds": (plain, _by(_clipped(1e9), 2), "2 times as long"),
    "a share that is no other reduction": (plain, _by(lambda model: None, 1 / NUM_MICRO), "0.25 times as long"),
    "twice, with bfloat16 below adapters": (Adapted, _by(lambda model: None, 2), "2 times as long"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_doubted_where_its_loss_is_another_one(name) -> None:
    make, step, doubt = LOOPS[name]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    probe = Probe(model, optimizer, regression, schedule=every(1), data="step")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            batches = [(torch.randn(8, 6), torch.randn(8, 1)) for _ in range(NUM_MICRO)]
            optimizer.zero_grad()
            step(model, optimizer, probe.watch(batches))
    said = " ".join(str(warning.message) for warning in caught)
    assert (doubt in said) if doubt else not said, said
    assert ({row["status"] for row in probe.trace} == {"not_reproduced"}) == bool(doubt)

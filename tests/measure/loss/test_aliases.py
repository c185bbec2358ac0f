"""measure.loss.objective: a second name for a parameter, as a buffer or a frozen parameter, changes no row."""

from collections.abc import Callable

import pytest
import torch
from networks import mlp
from torch import nn
from torch.nn import functional as F

from smoothdiag import Probe, every


def _frozen(model: nn.Sequential) -> None:
    model[0].also = nn.Parameter(model[0].weight.data, requires_grad=False)


NAMES: dict[str, Callable[[nn.Sequential], None]] = {
    "buffer": lambda model: model.register_buffer("also", model[0].weight.detach()),
    "part in a buffer": lambda model: model.register_buffer("also", model[0].weight.detach()[2:5]),
    "other shape in a buffer": lambda model: model.register_buffer("also", model[2].weight.detach().view(-1)),
    "frozen parameter": _frozen,
}


def _smoothness(rename: Callable[[nn.Sequential], object]) -> list[float]:
    torch.manual_seed(0)
    model = mlp(6, 8, 1)
    rename(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = Probe(
        model, optimizer, lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), schedule=every(1), seed=0
    )
    for batch in [(torch.randn(8, 6), torch.randn(8, 1)) for _ in range(3)]:
        probe.observe(batch)
        optimizer.zero_grad()
        F.mse_loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return [row["smoothness"] for row in probe.trace]


@pytest.mark.parametrize("name", NAMES)
def test_a_second_name_changes_no_row(name) -> None:
    assert _smoothness(NAMES[name]) == _smoothness(lambda model: None)

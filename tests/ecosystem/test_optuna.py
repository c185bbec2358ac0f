"""docs/ecosystem.md: Optuna searches for the longest step, which holds at other learning rates; max_norm does not."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recipes import recipe
from torch import nn
from torch.nn import functional as F

import smoothdiag as sd

pytestmark = pytest.mark.slow
optuna = pytest.importorskip("optuna")

CODE = recipe("Optuna")
LR = 1.0
"""A rate at which the network needs clipping."""


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def make(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def batches(number: int = 120) -> Iterator[Any]:
    draw = torch.Generator().manual_seed(1)
    teacher = torch.randn(8, 4, generator=draw)
    for _ in range(number):
        inputs = torch.randn(16, 8, generator=draw)
        yield inputs, (inputs @ teacher + 0.5 * torch.randn(16, 4, generator=draw)).argmax(1)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    probe: Any = None,
    clip: Callable[[nn.Module], Any] | None = None,
) -> float:
    """Returns the mean of the last thirty losses."""
    losses = []
    for batch in batches():
        if probe is not None:
            probe.observe(batch)
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        if clip is not None:
            clip(model)
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-30:]) / 30


def study_of(objective: Callable[[Any], float] | None, code: str, lr: float) -> Any:
    """Executes a recipe, or minimises a function, and returns the study."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    names: dict[str, Any] = {"sd": sd, "study": study, "loss_fn": loss_fn, "train": train}
    names["make_model_and_optimizer"] = lambda: make(lr)
    if objective is None:
        exec(code, names)
    else:
        study.optimize(objective, n_trials=20)
    return study


def test_a_share_found_at_one_rate_serves_at_another() -> None:
    found = study_of(None, CODE, LR)

    def with_norm(value: float, lr: float) -> float:
        model, optimizer = make(lr)
        return train(model, optimizer, clip=lambda model: nn.utils.clip_grad_norm_(model.parameters(), value))

    norms = study_of(lambda trial: with_norm(trial.suggest_float("max_norm", 1e-4, 1, log=True), LR), "", LR)

    def with_share(share: float, lr: float, mode: Any = "clip") -> tuple[float, sd.Probe]:
        model, optimizer = make(lr)
        probe = sd.Probe(model, optimizer, loss_fn, estimators=())
        sd.AutoClip(optimizer, probe, rule=sd.StepRule(multiple=None, relative=share), mode=mode)
        return train(model, optimizer, probe), probe

    ends = {lr: with_share(found.best_params["share"], lr)[0] for lr in (0.1, 1.0, 10.0)}
    others = {lr: with_norm(norms.best_params["max_norm"], lr) for lr in ends}
    assert max(ends.values()) < 1.02 * found.best_value
    assert found.best_value < 1.05 * norms.best_value
    assert min(others[0.1], others[10.0]) > 1.3 * norms.best_value
    assert train(*make(LR)) > 5 * found.best_value
    again, probe = with_share(found.best_params["share"], LR)
    assert again == found.best_value
    assert len(probe.trace) == 0, "a fixed share needs no measurement"
    assert with_share(found.best_params["share"], LR, "shadow")[0] == train(*make(LR))

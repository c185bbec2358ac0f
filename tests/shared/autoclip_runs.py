"""A small training run that an AutoClip can be hooked into, and stopped and resumed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from losses import cross_entropy
from networks import mlp
from torch import Tensor, nn

from smoothdiag import AutoClip, LocalSmoothness, Probe


def never(step: int) -> bool:
    return False


LOCAL = (LocalSmoothness(),)


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return mlp(6, 16, 3).to(dtype)


def batches(num: int, seed: int = 5, dtype: torch.dtype = torch.float32, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    teacher = torch.randn(6, 3, generator=source)
    inputs = [torch.randn(size, 6, generator=source) for _ in range(num)]
    return [(x.to(dtype), (x @ teacher).argmax(1)) for x in inputs]


class Run:
    """Model, optimizer, probe and AutoClip, and a loop over batches."""

    def __init__(
        self,
        make: Callable[[Any], torch.optim.Optimizer],
        *,
        clipped: bool = True,
        estimators: Any = LOCAL,
        trace: Any = None,
        schedule: Any = never,
        dtype: torch.dtype = torch.float32,
        data: Any = "fixed",
        **options: Any,
    ) -> None:
        self.model = network(dtype=dtype)
        self.optimizer = make(self.model)
        self.probe = Probe(
            self.model, self.optimizer, cross_entropy, estimators=estimators, schedule=schedule, trace=trace, data=data
        )
        self.clipper = AutoClip(self.optimizer, self.probe, **options) if clipped else None
        self.losses: list[float] = []

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.optimizer.zero_grad()
        self.probe.observe(batch)
        loss = cross_entropy(self.model, batch)
        self.losses.append(float(loss.detach()))
        loss.backward()
        self.optimizer.step()

    def over(self, loader: Iterable[tuple[Tensor, Tensor]]) -> "Run":
        for batch in loader:
            self.step(batch)
        return self

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def sgd(lr: float = 0.5, momentum: float = 0.0, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, **options)


def adamw(lr: float = 0.01) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=lr)


def two_groups(rates: tuple[float, float] = (2.0, 0.5), **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        groups = [
            {"params": list(part.parameters()), "lr": lr} for part, lr in zip((model[0], model[2]), rates, strict=True)
        ]
        return torch.optim.SGD(groups, **options)

    return make


def by_closure(run: Run, batch, *, positional: bool = False) -> None:
    """Takes a step whose loss the optimizer evaluates itself, batch and all."""

    def closure():
        run.optimizer.zero_grad()
        run.probe.observe(batch)
        loss = cross_entropy(run.model, batch)
        loss.backward()
        return loss

    if positional:
        run.optimizer.step(closure)
    else:
        run.optimizer.step(closure=closure)

"""Loops: training with a probe or without, on networks whose cost is known to lie in one place."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from models import GPT, TASKS, Task, labelled_loss
from torch import Tensor, nn

from smoothdiag import LocalSmoothness, PathSmoothness, Probe, every
from smoothdiag.demo import next_character_loss
from smoothdiag.measure.probe.schedule import Schedule

PATH, LOCAL = [PathSmoothness()], [LocalSmoothness()]
DEFAULT = [*PATH, *LOCAL]
NEVER = 10**9
HAS_OFFLOAD = "offload" in inspect.signature(Probe).parameters

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Many(nn.Module):
    """A model of many short tensors, in which each operation costs more than what it computes."""

    def __init__(self, number: int = 3000, length: int = 32) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(length)) for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.stack(list(self.parts)) * x).square().mean()


def perceptron(width: int, depth: int, classes: int = 10) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def images(width: int, number: int, classes: int = 10) -> Callable[[torch.device], tuple[Tensor, Tensor]]:
    return lambda device: (torch.randn(number, width).to(device), torch.randint(classes, (number,)).to(device))


def tokens(vocabulary: int, batch: int, length: int) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.randint(vocabulary, (batch, length + 1)).to(device)


def in_bfloat16(task: Task) -> Task:
    def batch(device: torch.device) -> Any:
        return tuple(x.bfloat16() if x.is_floating_point() else x for x in task.batch(device))

    return dataclasses.replace(task, build=lambda: task.build().bfloat16(), batch=batch)


# Parameters outweigh activations by far, as in fine-tuning and in large models; no tensor is larger than a twelfth.
LARGE_PARAMETERS = Task(lambda: perceptron(512, 12), labelled_loss, images(512, 8), lr=0.01)
SIX_TENSORS = Task(lambda: perceptron(16, 2), labelled_loss, images(16, 32), lr=0.1)
SMALL_GPT = Task(lambda: GPT(4, 128, 4, 16, 512), next_character_loss, tokens(512, 1, 16), lr=0.1)
MANY_TENSORS = Task(Many, lambda model, x: model(x), lambda device: torch.randn(32).to(device), lr=0.1)
NETWORKS = {
    "LSTM .1M of the demo": TASKS["LSTM of the demo"],
    "ResNet-20": TASKS["ResNet-20"],
    "GPT .8M, 1,024 tokens": TASKS["GPT"],
    "GPT 10M, 32 tokens": Task(lambda: GPT(5, 384, 6, 32, 4096), next_character_loss, tokens(4096, 1, 32), lr=0.1),
    "GPT 57M, 32 tokens": Task(lambda: GPT(8, 768, 12, 32, 256), next_character_loss, tokens(256, 1, 32), lr=0.1),
}


class Loop:
    """A model in training, with a probe or without.

    Args:
        task: Model, loss and batch.
        device: Where to train.
        estimators: What to measure; ``None`` trains without a probe.
        schedule: When to measure; default: at every step.
        optimizer: Makes the optimizer; default: plain SGD.
        micro_batches: Number of backward passes of a step.
        options: Further options of the probe.
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        estimators: Sequence[Any] | None = None,
        schedule: Schedule | None = None,
        *,
        optimizer: Optimizer | None = None,
        micro_batches: int = 1,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.task, self.device, self.micro_batches = task, device, micro_batches
        self.model, self.batch = task.build().to(device), task.batch(device)
        make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=task.lr))
        self.optimizer, self.backward_passes, self.probe = make(self.model.parameters()), 0, None
        if estimators is not None:
            options = {"estimators": estimators, "schedule": schedule or every(1), **options}
            self.probe = Probe(self.model, self.optimizer, self.measured_loss, **options)

    @property
    def size(self) -> int:
        """Bytes of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def measured_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss as the probe evaluates it, whose backward passes are counted."""
        loss = self.task.loss_fn(model, batch)
        if loss.requires_grad:
            loss.register_hook(self._count)
        return loss

    def _count(self, _: Tensor) -> None:
        self.backward_passes += 1

    def observe(self) -> None:
        if self.probe:
            self.probe.observe(self.batch)

    def forward(self) -> None:
        self.task.loss_fn(self.model, self.batch)

    def gradient(self) -> None:
        self.optimizer.zero_grad()
        self.task.loss_fn(self.model, self.batch).backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        for _ in range(self.micro_batches):
            self.observe()
            (self.task.loss_fn(self.model, self.batch) / self.micro_batches).backward()
        self.optimizer.step()

    def hooks(self) -> None:
        """Takes a step without gradients: the optimizer has nothing to do, the probe works as usual."""
        for _ in range(100):
            self.observe()
            self.optimizer.step()

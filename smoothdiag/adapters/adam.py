"""Adam and AdamW."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from smoothdiag.adapters import limits
from smoothdiag.adapters.adaptive import Adaptive
from smoothdiag.adapters.diagonals import correction
from smoothdiag.adapters.protocol import Group, State
from smoothdiag.adapters.updates import undone


class Adam(Adaptive):
    """Describes `torch.optim.Adam` and its subclass `torch.optim.AdamW`."""

    kind: type[torch.optim.Optimizer]

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.kind = torch.optim.AdamW if isinstance(optimizer, torch.optim.AdamW) else torch.optim.Adam

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the optimizer is Adam, or of a subclass of it."""
        return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)

    def entries(self, group: Group) -> tuple[str, ...]:
        """Returns the second moment, or the largest so far for AMSGrad, and the number of steps."""
        return "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq", "step"

    def diagonal(self, state: State, group: Group) -> Tensor:
        """Returns the root of the second moment, with its correction; AMSGrad divides by the largest so far."""
        second, step = (state[entry] for entry in self.entries(group))
        root: Tensor = (second / correction(group["betas"][1], step)).sqrt() + group["eps"]
        return root

    def limit(self, group: Group, states: Sequence[State]) -> float:
        """Returns (2 / lr) (1 + b) / (1 - b), with 2 / lr - w instead of 2 / lr if weight decay is decoupled."""
        if group["weight_decay"] and not self._decouples(group):
            return math.nan
        momentum = float(group["betas"][0])
        return (limits.two_over(float(group["lr"])) - float(group["weight_decay"])) * (1 + momentum) / (1 - momentum)

    def last(self, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> Tensor | None:
        """Returns the rate times the corrected momentum over P, plus the part of decoupled weight decay."""
        lr, decay = float(group["lr"]), group["weight_decay"] if self._decouples(group) else 0.0
        correction = 1 - group["betas"][0] ** float(state["step"])
        step = (lr / correction) * state["exp_avg"] / self.diagonal(state, group)
        return undone(-step, lr * decay, parameter, group)

    def _decouples(self, group: Group) -> bool:
        return self.kind is torch.optim.AdamW or bool(group.get("decoupled_weight_decay"))

"""Adam, AdamW and NAdam."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smoothdiag.adapters import limits
from smoothdiag.adapters.adaptive import Adaptive
from smoothdiag.adapters.diagonals import correction
from smoothdiag.adapters.protocol import Group, State
from smoothdiag.adapters.unknown import Unknown, has_step_of
from smoothdiag.adapters.updates import Formula, Stretch, Update, leaves_enough, number, plus


class Adam(Adaptive):
    """Describes `torch.optim.Adam` and its subclass `torch.optim.AdamW`."""

    kind: type[torch.optim.Optimizer]
    second = "exp_avg_sq"

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

    def limits(self, group: Group, states: Sequence[State]) -> limits.Pair:
        """Returns (2 / lr) (1 + b) / (1 - b) and 2 / lr, with 2 / lr - w for 2 / lr if weight decay is decoupled."""
        if group["weight_decay"] and not self._decouples(group):
            return limits.NO_PAIR
        momentum, limit = float(group["betas"][0]), limits.two_over(float(group["lr"])) - float(group["weight_decay"])
        return limit * (1 + momentum) / (1 - momentum), limit

    def update(self, group: Group) -> Formula | None:
        """Returns how the last update follows from the state."""
        formula = super().update(group)
        return Formula(formula.last, partial(self.most, group)) if formula else None

    def tells(self, group: Group) -> bool:
        """Returns whether decoupled weight decay, if there is any, leaves enough of x."""
        return not (group["weight_decay"] and self._decouples(group)) or leaves_enough(group)

    def last(self, group: Group, stretch: Stretch) -> Update:
        """Returns the rate times the corrected momentum over P, plus the part of decoupled weight decay."""
        lr, decay = number(group["lr"]), number(group["weight_decay"]) if self._decouples(group) else 0.0
        moment, root, direction = _over_root(group, stretch, self.entries(group)[0])
        torch.div(stretch["exp_avg"], direction, out=direction)
        if decay:
            plus(direction, stretch.parameter, decay * moment / root)
        return Update(direction, -lr * root / moment / (1 - lr * decay))

    def most(self, group: Group, stretch: Stretch) -> float:
        """Returns the squared length without epsilon: that needs no root, and it can only make updates longer."""
        lr, decay = float(group["lr"]), float(group["weight_decay"]) if self._decouples(group) else 0.0
        moment, square = (correction(beta, stretch.scalar("step")) for beta in group["betas"])
        average = stretch["exp_avg"]
        length = abs(float(torch.dot(average / stretch[self.entries(group)[0]], average)) * square) ** 0.5 / moment
        if decay:
            x = stretch.parameter
            length += decay * float(torch.dot(x, x)) ** 0.5
        return float((length * lr / (1 - lr * decay)) ** 2)

    def _decouples(self, group: Group) -> bool:
        return self.kind is torch.optim.AdamW or bool(group.get("decoupled_weight_decay"))


class NAdam(Unknown):
    """Describes `torch.optim.NAdam`, which moves along a mixture of momentum and gradient."""

    second = "exp_avg_sq"

    @staticmethod
    def matches(optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the optimizer is NAdam, or of a subclass of it."""
        return isinstance(optimizer, torch.optim.NAdam)

    def update(self, group: Group) -> Formula | None:
        """Returns how the last update follows from state and gradient; ``None`` also for coupled weight decay."""
        decays = bool(group["weight_decay"])
        told = not decays or (group.get("decoupled_weight_decay") and leaves_enough(group))
        known = told and has_step_of(self.optimizer, torch.optim.NAdam) and not group.get("differentiable")
        return Formula(partial(self._last, group)) if known else None

    def _last(self, group: Group, stretch: Stretch) -> Update:
        """Returns the rate times Nesterov's mixture over P, plus the part of weight decay."""
        lr, decay, beta = number(group["lr"]), number(group["weight_decay"]), number(group["betas"][0])
        product, step = stretch.scalar("mu_product"), stretch.scalar("step")
        now, coming = (beta * (1 - 0.5 * 0.96 ** (k * number(group["momentum_decay"]))) for k in (step, step + 1))
        _, root, direction = _over_root(group, stretch, "exp_avg_sq")
        mixed = stretch["exp_avg"] * (coming / (1 - product * coming))
        plus(mixed, stretch.gradient, (-1 if group["maximize"] else 1) * (1 - now) / (1 - product))
        torch.div(mixed, direction, out=direction)
        if decay:
            plus(direction, stretch.parameter, decay / root)
        return Update(direction, -lr * root / (1 - lr * decay))


def _over_root(group: Group, stretch: Stretch, second: str) -> tuple[Any, Any, Tensor]:
    """Returns the correction of the momentum, the root of that of the second moment, and the latter times P."""
    moment, square = (correction(beta, stretch.scalar("step")) for beta in group["betas"])
    root = square**0.5
    return moment, root, stretch[second].sqrt().add_(group["eps"] * root)

"""Adaptive optimizers, which divide the gradient by a diagonal from their state; RMSprop and Adagrad."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from smoothdiag.adapters import limits
from smoothdiag.adapters.diagonals import Diagonals
from smoothdiag.adapters.protocol import UNKNOWN, Group, Limits, StabilityLimit, State
from smoothdiag.adapters.unknown import Unknown, has_step_of
from smoothdiag.adapters.updates import Formula, Stretch, Update, number


class Adaptive(Unknown, ABC):
    """Describes adaptive optimizers: the part that all of them share.

    Attributes:
        kind: The class of torch.
    """

    kind: type[torch.optim.Optimizer]

    @classmethod
    def matches(cls, optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the optimizer is of this class of torch, or of a subclass of it."""
        return isinstance(optimizer, cls.kind)

    def preconditioner(self, parameters: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Returns the diagonal of P if the optimizer moves along P^-1 m; ``None`` if its state does not show P.

        Parameters that the optimizer has not moved yet have P = 0; their gradients and displacements are zero too.

        Source: Cohen et al. 2022, *Adaptive gradient methods at the edge of stability*, for P of Adam and RMSprop.
        """
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}

        def of(parameter: Tensor) -> Tensor:
            if state := self.state_of(parameter):
                return self.diagonal(state, groups[parameter])
            return torch.zeros_like(parameter, requires_grad=False)

        # A subclass may keep its state under other names.
        is_shown = all(
            p in groups and all(entry in state for entry in self.entries(groups[p]))
            for p in parameters
            if (state := self.state_of(p))
        )
        return Diagonals(parameters, of) if is_shown else None

    def stability_limit(self, parameters: Sequence[Tensor]) -> Limits:
        """Returns the limit in the norm of P."""
        if not has_step_of(self.optimizer, self.kind):
            return UNKNOWN
        curvature, small_batch = limits.common(self.optimizer, parameters, self.limits)
        return StabilityLimit(curvature, preconditioned=True, small_batch=small_batch)

    def update(self, group: Group) -> Formula | None:
        """Returns how the last update follows from the state."""
        known = has_step_of(self.optimizer, self.kind) and not group.get("differentiable")
        return Formula(partial(self.last, group)) if known and self.tells(group) else None

    @abstractmethod
    def entries(self, group: Group) -> tuple[str, ...]:
        """Returns the names of what the state holds for P."""

    @abstractmethod
    def diagonal(self, state: State, group: Group) -> Tensor:
        """Returns the diagonal of P for one parameter."""

    @abstractmethod
    def limits(self, group: Group, states: Sequence[State]) -> limits.Pair:
        """Returns the limits of stability of one group, for full batches and for small ones."""

    @abstractmethod
    def tells(self, group: Group) -> bool:
        """Returns whether state and gradient tell the last update with the options of a group."""

    @abstractmethod
    def last(self, group: Group, stretch: Stretch) -> Update:
        """Returns the last update."""

    def along_gradient(self, group: Group, stretch: Stretch, lr: float | Tensor) -> Update:
        """Returns u = -lr P^-1 g."""
        below = self.diagonal(stretch, group)
        return Update(torch.div(stretch.gradient, below, out=below), lr if group["maximize"] else -lr)


class RmsProp(Adaptive):
    """Describes `torch.optim.RMSprop`."""

    kind = torch.optim.RMSprop
    second = "square_avg"

    def entries(self, group: Group) -> tuple[str, ...]:
        """Returns the mean square, and the mean whose square is taken from it."""
        return ("square_avg", "grad_avg") if group["centered"] else ("square_avg",)

    def diagonal(self, state: State, group: Group) -> Tensor:
        """Returns the root of the mean square, or of the variance."""
        second: Tensor = state["square_avg"]
        if group["centered"]:
            second = second - state["grad_avg"].square()
        root: Tensor = second.clamp(min=0).sqrt() + group["eps"]
        return root

    def limits(self, group: Group, states: Sequence[State]) -> limits.Pair:
        """Returns (2 + 2b) / lr and (2 - 2b) / lr."""
        if group["weight_decay"]:
            return limits.NO_PAIR
        limit, momentum = limits.two_over(float(group["lr"])), float(group["momentum"])
        return limit * (1 + momentum), limit * (1 - momentum)

    def tells(self, group: Group) -> bool:
        """Returns whether momentum or no weight decay tells it: P^-1 w x alone would hide x."""
        return bool(group["momentum"] > 0 or group["weight_decay"] == 0)

    def last(self, group: Group, stretch: Stretch) -> Update:
        """Returns the rate times the momentum, or times the gradient over P."""
        lr = number(group["lr"])
        if group["momentum"] > 0:
            return Update(stretch["momentum_buffer"].clone(), -lr)
        return self.along_gradient(group, stretch, lr)


class Adagrad(Adaptive):
    """Describes `torch.optim.Adagrad`."""

    kind = torch.optim.Adagrad

    def entries(self, group: Group) -> tuple[str, ...]:
        """Returns the sum of squares."""
        return ("sum",)

    def diagonal(self, state: State, group: Group) -> Tensor:
        """Returns the root of the sum of squares."""
        total: Tensor = state["sum"]
        root: Tensor = total.sqrt() + group["eps"]
        return root

    def limits(self, group: Group, states: Sequence[State]) -> limits.Pair:
        """Returns 2 over the decayed rate, twice; NaN if parameters have seen different numbers of steps."""
        if group["weight_decay"]:
            return limits.NO_PAIR
        rate, decay = float(group["lr"]), float(group["lr_decay"])
        if decay == 0:
            return (limits.two_over(rate),) * 2
        found = {limits.two_over(rate / (1 + max(steps - 1, 0) * decay)) for steps in limits.step_counts(states)}
        return (found.pop(),) * 2 if len(found) == 1 else limits.NO_PAIR

    def tells(self, group: Group) -> bool:
        """Returns whether there is no weight decay: P^-1 w x would hide x."""
        return bool(group["weight_decay"] == 0)

    def last(self, group: Group, stretch: Stretch) -> Update:
        """Returns the decayed rate times the gradient over P."""
        decayed = 1 + (stretch.scalar("step") - 1) * group["lr_decay"]
        return self.along_gradient(group, stretch, number(group["lr"]) / decayed)

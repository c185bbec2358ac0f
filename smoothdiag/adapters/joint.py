"""Joint: several optimizers that take one step together, such as Muon for matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from smoothdiag import vectors


class Follower(Protocol):
    """Somebody who follows the steps of a `Joint`."""

    def finish(self) -> None:
        """Ends a step in which an optimizer was left out."""
        ...


class Joint(torch.optim.Optimizer):
    """Several optimizers seen as one: the groups and the states of all of them. It takes no steps of its own.

    Args:
        optimizers: Two or more optimizers, in any order.

    Raises:
        ValueError: If two of them hold the same parameter.

    Attributes:
        optimizers: The optimizers.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        # The parent's constructor would make groups and states of its own. Here they are those of the optimizers.
        self.optimizers = tuple(optimizers)
        self._followers: list[Follower] = []
        self._states: _States | None = None
        owners: dict[int, torch.optim.Optimizer] = {}
        for optimizer in self.optimizers:
            for parameter in moved_by(optimizer):
                if owners.setdefault(id(parameter), optimizer) is not optimizer:
                    raise ValueError(
                        "Parameter `optimizer` should be a list of optimizers that move different parameters. Found "
                        f"one of shape {tuple(parameter.shape)} in both {type(owners[id(parameter)]).__name__} and "
                        f"{type(optimizer).__name__}."
                    )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all optimizers; the dictionaries are theirs."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> Mapping[Tensor, Any]:  # type: ignore[override]
        """What the optimizers keep for each parameter; the same object as long as they keep it in the same ones."""
        held = [optimizer.state for optimizer in self.optimizers]
        if self._states is None or not self._states.consists_of(held):
            self._states = _States(held)
        return self._states

    @property
    def grad_scale(self) -> Tensor | None:
        """The factor of a GradScaler that a fused optimizer takes out of the gradients in its step, if any."""
        return next((s for o in self.optimizers if (s := getattr(o, "grad_scale", None)) is not None), None)

    @property
    def found_inf(self) -> Tensor | None:
        """What a GradScaler has found, where a fused optimizer is going to look at it."""
        return next((f for o in self.optimizers if (f := getattr(o, "found_inf", None)) is not None), None)

    def follow(self, follower: Follower) -> None:
        """Adds somebody who is called last by ``finish``."""
        self.forget(follower)
        self._followers.append(follower)

    def forget(self, follower: Follower) -> None:
        """Removes somebody who followed."""
        self._followers = [f for f in self._followers if f is not follower]

    def finish(self) -> None:
        """Ends a step in which an optimizer was left out, for everybody who follows."""
        for follower in self._followers:
            follower.finish()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.optimizers,)  # copies follow nobody: hooks stay with the optimizers too

    def step(self, closure: Any = None) -> Any:
        """Raises a RuntimeError: each of the optimizers steps by itself."""
        raise RuntimeError(f"{name_of(self)} should step one by one. Found a call of `step` of all of them.")

    def __repr__(self) -> str:
        return f"<{name_of(self)}>"


def moved_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns the parameters of an optimizer, each once."""
    found: list[nn.Parameter] = vectors.unique(*(group["params"] for group in optimizer.param_groups))
    return found


def parameter_names(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters with their names, where the optimizer was made from ``model.named_parameters()``."""
    return [
        (name, p)
        for group in optimizer.param_groups
        for name, p in zip(group.get("param_names", ()), group["params"], strict=False)
    ]


def members(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """Returns the optimizers of a `Joint`; an optimizer alone is its only member."""
    return optimizer.optimizers if isinstance(optimizer, Joint) else (optimizer,)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Returns the name of the optimizer's class, or those of several."""
    return " + ".join(type(member).__name__ for member in members(optimizer))


def finish(optimizer: torch.optim.Optimizer) -> None:
    """Ends a step of several optimizers if one has been left out; does nothing for one alone."""
    if isinstance(optimizer, Joint):
        optimizer.finish()


class _States(Mapping[Tensor, Any]):
    """The states of several optimizers as one mapping, without a copy."""

    def __init__(self, held: Sequence[Mapping[Tensor, Any]]) -> None:
        self._held = list(held)

    def consists_of(self, held: Sequence[Mapping[Tensor, Any]]) -> bool:
        return all(mine is theirs for mine, theirs in zip(self._held, held, strict=True))

    def __getitem__(self, parameter: Tensor) -> Any:
        for state in self._held:
            if parameter in state:
                return state[parameter]
        raise KeyError(parameter)

    def __iter__(self) -> Iterator[Tensor]:
        for state in self._held:
            yield from state

    def __len__(self) -> int:
        return sum(map(len, self._held))

"""Base of the optimizers: options that every step checks, and parameters, gradients and states in buckets."""

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from smoothdiag import vectors
from smoothdiag.optim import arithmetic
from smoothdiag.optim.described import Described

Group = dict[str, Any]


class Option(NamedTuple):
    """The values that an option of a group may take."""

    valid: Callable[[Any], bool]
    requirement: str
    """Completes "should be"."""
    tensor: bool = False
    """Whether a 0-dim tensor is allowed. Its value is not checked, because reading it would wait for the device."""


LEARNING_RATE = Option(lambda v: 0 <= v < math.inf, "finite and non-negative", tensor=True)
NON_NEGATIVE = Option(lambda v: 0 <= v < math.inf, "finite and non-negative")
POSITIVE = Option(lambda v: v > 0, "positive", tensor=True)
FLAG = Option(lambda v: isinstance(v, bool), "True or False")
COMMON: Mapping[str, Option] = {
    "lr": LEARNING_RATE,
    "maximize": FLAG,
    "foreach": Option(lambda v: v is None or isinstance(v, bool), "True, False or None"),
    "capturable": FLAG,
}


@dataclass
class Bucket:
    """The parameters of one group that have a gradient and share a device and a dtype.

    Attributes:
        group: The options.
        owners: The parameters as the optimizer got them; sharded parameters are DTensors.
        params: The parts of the parameters that this rank holds, sharing their memory.
        grads: The same parts of the gradients, for reading only.
        states: The same parts of each state, by name; ``"step"`` is 0-dim.
    """

    group: Group
    owners: list[Tensor]
    params: list[Tensor]
    grads: Sequence[Tensor]
    states: dict[str, list[Tensor]]

    @property
    def foreach(self) -> bool:
        """Whether to use the operations on lists."""
        return self.group["foreach"] is not False


class StepOptimizer(Described, abc.ABC):
    """Base of the optimizers: a subclass names its options and its states, and writes the step.

    ``.grad`` is never written. A step that raises an error changes nothing. Nothing waits for a device, unless DTensor
    gradients have other placements than their parameters.
    """

    OPTIONS: ClassVar[Mapping[str, Option]]
    """The allowed values for every option of a group."""

    LATER: ClassVar[Mapping[str, Any]] = {}
    """Options that states of the first version lack, with the values that the first version implied."""

    @abc.abstractmethod
    def _kept(self, group: Group) -> Sequence[str]:
        """Returns the names of a parameter's states, which start as zeros of its shape.

        A state called ``"step"`` comes first. It is a 0-dim counter that the subclass advances. It starts at infinity
        if the parameter has other states already, because nobody counted their age.
        """

    @abc.abstractmethod
    def _update(self, buckets: list[Bucket]) -> None:
        """Moves the parameters. ``buckets`` holds at least one bucket; nothing in here should raise an error."""

    def _check(self, group: Group) -> None:
        """Raises a ValueError if an option is out of range; subclasses add checks of options against each other."""
        for name, option in self.OPTIONS.items():
            check_option(name, group[name], option)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled or saved state; options missing in the state take their defaults."""
        super().__setstate__(state)
        self.defaults = {**self.LATER, **self.defaults}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; see `torch.optim.Optimizer.add_param_group`."""
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step without waiting for a device.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            # Everything that can raise an error comes before the first write: a refused step changes nothing.
            for group in self.param_groups:
                self._check(group)
                for param in group["params"]:
                    if param.grad is not None:
                        _check_gradient(self, param, param.grad)
            self._check_capture()
            buckets = [bucket for group in self.param_groups for bucket in self._buckets(group)]
            if buckets:
                self._update(buckets)
        return loss

    def _check_capture(self) -> None:
        if torch.compiler.is_compiling() or not (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        ):
            return
        for group in self.param_groups:
            if not group["capturable"]:
                raise RuntimeError("Parameter `capturable` should be True to capture a step in a CUDA graph.")
            for name, value in group.items():
                if isinstance(value, Tensor) and not value.is_cuda:  # a replay would not see changes of it
                    raise RuntimeError(f"Parameter `{name}` should be on the GPU to be captured in a CUDA graph.")

    # torch.compile runs a method of this name and signature as it is, and maps what the method appends to the lists.
    # So it fills lists and returns nothing.
    def _init_group(self, group: Group, owners: list[Tensor], grads: list[Tensor], *states: list[Tensor]) -> None:
        kept = self._kept(group)
        for param in group["params"]:
            if param.grad is None:
                continue
            owners.append(param)
            grads.append(param.grad)
            if "step" not in kept and param in self.state:
                self.state[param].pop("step", None)  # the counter would stop while the other states go on
            for name, found in zip(kept, states, strict=True):
                state = self.state[param]
                if name not in state:
                    zeros = torch.zeros_like(param, memory_format=torch.preserve_format)
                    state[name] = _new_step(param, group, state) if name == "step" else zeros
                found.append(state[name])

    def _buckets(self, group: Group) -> list[Bucket]:
        names = self._kept(group)
        owners: list[Tensor] = []
        grads: list[Tensor] = []
        states: list[list[Tensor]] = [[] for _ in names]
        self._init_group(group, owners, grads, *states)
        members: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, param in enumerate(owners):
            members.setdefault((param.device, param.dtype), []).append(i)
        return [
            Bucket(
                group,
                owners=[owners[i] for i in indices],
                params=[_local(owners[i]) for i in indices],
                grads=[_local_like(grads[i], owners[i]) for i in indices],
                states={name: [_local(found[i]) for i in indices] for name, found in zip(names, states, strict=True)},
            )
            for indices in members.values()
        ]


class CappedOptimizer(StepOptimizer):
    """Base of optimizers with a longest step, which groups give as such or as the threshold longest_step / lr."""

    CAPS: ClassVar[Mapping[str, Option]] = {
        name: Option(lambda v: v is None or v > 0, "positive", tensor=True) for name in ("threshold", "longest_step")
    }
    """The two options; each group has exactly one that is not None."""

    way = "cap"

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; its own threshold or longest step replaces whichever of the two is the default."""
        caps = dict.fromkeys(self.CAPS) if self.CAPS.keys() & param_group.keys() else {}
        super().add_param_group({**caps, **param_group})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled or saved state; options missing in the state take their defaults."""
        for group in state["param_groups"]:
            if self.CAPS.keys() & group.keys():  # else the default could add the other cap
                for name in self.CAPS:
                    group.setdefault(name, None)
        super().__setstate__(state)

    def _check(self, group: Group) -> None:
        super()._check(group)
        threshold, longest_step = group["threshold"], group["longest_step"]
        if (threshold is None) == (longest_step is None):
            raise ValueError(
                "Parameter `threshold` should be given, or `longest_step` instead: one of the two in every group. "
                f"Found `threshold = {threshold!r}`, `longest_step = {longest_step!r}`."
            )


def check_option(name: str, value: Any, option: Option) -> None:
    """Raises a ValueError if an option has a value that is not allowed."""
    if isinstance(value, Tensor):
        if not option.tensor or value.dim() > 0:
            number = "a number or a 0-dim tensor" if option.tensor else "no tensor"
            raise ValueError(f"Parameter `{name}` should be {number}. Found `{name} = {value!r}`.")
        return
    try:
        valid = option.valid(value)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"Parameter `{name}` should be {option.requirement}. Found `{name} = {value!r}`.")


def _check_gradient(optimizer: Optimizer, param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided or grad.is_complex():
        kind = "complex" if grad.is_complex() else "sparse"
        raise RuntimeError(f"{type(optimizer).__name__} needs dense, real gradients. Found a {kind} one.")
    if grad.dtype != param.dtype:
        raise RuntimeError(f"{type(optimizer).__name__} needs gradients that have the dtype of their parameters.")
    if vectors.is_sharded(param) != vectors.is_sharded(grad):
        raise RuntimeError(
            "A DTensor parameter needs a DTensor as its gradient, and a plain parameter needs a plain tensor."
        )
    if vectors.is_sharded(param) and vectors.is_sharded(grad) and param.device_mesh != grad.device_mesh:
        raise RuntimeError("A gradient should lie on the device mesh of its parameter.")


def step_length(group: Group, total: Tensor) -> Tensor:
    """Returns lr * min{threshold, total} or min{longest_step, lr * total}, the length of a capped step."""
    if group["longest_step"] is not None:
        return torch.minimum(total * group["lr"], arithmetic.scalar(group["longest_step"], total))
    step: Tensor = torch.minimum(total, arithmetic.scalar(group["threshold"], total)) * group["lr"]
    return step


def _local(x: Tensor) -> Tensor:
    return vectors.local(x) if vectors.is_sharded(x) else x


def _local_like(grad: Tensor, param: Tensor) -> Tensor:
    if vectors.is_sharded(grad) and vectors.is_sharded(param) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return _local(grad)


def _new_step(param: Tensor, group: Group, state: dict[str, Any]) -> Tensor:
    # Arithmetic with the counter is cheap on the CPU; a captured graph needs it on the parameter's device.
    device = _local(param).device if group["capturable"] else torch.device("cpu")
    return torch.full((), math.inf if state else 0.0, dtype=torch.float32, device=device)

"""Batches: what the training loop saw, the random states it started from, and how a batch is taken apart."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smoothdiag.measure.loss.state import Snapshot
from smoothdiag.memory import is_out_of_memory


@dataclass(frozen=True)
class RandomState:
    """The states of all generators that a forward pass may draw from."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls, devices: Sequence[torch.device] = ()) -> "RandomState":
        """Returns the present states of torch (on the CPU and ``devices``), NumPy's global generator and Python."""
        states = tuple((device, torch.get_device_module(device).get_rng_state(device)) for device in devices)
        return cls(torch.get_rng_state(), states, np.random.get_state(), random.getstate())  # noqa: NPY002

    @staticmethod
    def seed(seed: int) -> None:
        """Seeds every generator, also on all devices."""
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)

    def restore(self) -> None:
        """Puts every generator back into the captured state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)


@dataclass(frozen=True)
class MicroBatch:
    """One batch as the training loop saw it, with the state that its forward pass started from.

    Attributes:
        batch: What ``loss_fn`` takes.
        random_state: State of the random number generators before the forward pass.
        state: State of the model besides x before the forward pass; ``None`` takes the state at the measurement.
        weight: Weight of this batch's loss in the loss of the step; ``None`` leaves it to the reduction.
        others: Parameters outside x and the values that they had for this batch, if another optimizer moved them
            between the batches of the step.
    """

    batch: Any
    random_state: RandomState
    state: Snapshot | None = None
    weight: float | None = None
    others: Sequence[tuple[Tensor, Tensor]] = ()


def map_tensors(
    batch: Any, function: Callable[[Tensor], Tensor], others: Callable[[Any], Any] = lambda value: value
) -> Any:
    """Returns the batch with ``function`` applied to the tensors in nested tuples, lists, mappings and dataclasses.

    Args:
        batch: The batch.
        function: Applied to tensors.
        others: Applied to objects of other classes; arrays are always copied.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return _refilled(batch, {key: map_tensors(value, function, others) for key, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return _rebuilt(batch, [map_tensors(value, function, others) for value in batch])
    if isinstance(batch, np.ndarray):
        return batch.copy()  # an array does not show whether it was written to
    if is_dataclass(batch) and not isinstance(batch, type):
        twin = copy.copy(batch)
        for field in fields(batch):
            object.__setattr__(twin, field.name, map_tensors(getattr(batch, field.name), function, others))
        return twin
    return others(batch)


def _refilled(batch: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    """Returns a mapping of the same class with other entries, or a dictionary if the class cannot be made."""
    try:
        twin = copy.copy(batch)
        for key, value in entries.items():
            twin[key] = value  # type: ignore[index]
        return twin
    except (TypeError, AttributeError):  # it cannot be written to
        pass
    try:
        return type(batch)(entries)  # type: ignore[call-arg]
    except TypeError:
        return entries


def _rebuilt(batch: tuple[Any, ...] | list[Any], entries: list[Any]) -> Any:
    """Returns a tuple or list of the same class with other entries, whatever arguments its constructor wants."""
    if isinstance(batch, list):
        twin = copy.copy(batch)
        twin[:] = entries
        return twin
    try:
        return type(batch)(*entries) if hasattr(batch, "_fields") else type(batch)(entries)
    except TypeError:
        return tuple.__new__(type(batch), entries)


def copied(tensor: Tensor) -> Tensor:
    """Returns a copy with the strides of ``tensor``, because other strides make a compiled model compile again."""
    twin = tensor.detach().clone()
    if type(twin) is not Tensor or twin.is_nested or twin.layout != torch.strided or twin.stride() == tensor.stride():
        return twin
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    # For a slice of a much larger tensor, copying the whole costs too much.
    if not 0 < span <= 4 * tensor.numel():
        return twin
    whole = tensor.detach().as_strided((span,), (1,)).clone()
    return whole.as_strided(tensor.shape, tensor.stride())


def lasting(batch: Any) -> Any:
    """Returns a copy of the batch that stays as it is, whatever the loop does with its own.

    Tensors stay on their devices. Modules and functions in the batch are not copied; objects of other classes are
    copied by ``copy.deepcopy``.

    Raises:
        ValueError: If an object cannot be copied.
    """
    return map_tensors(batch, lambda tensor: copied(tensor).requires_grad_(tensor.requires_grad), _deep_copy)


def _deep_copy(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return value
    try:
        return copy.deepcopy(value)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            "Batches should consist of objects that can be copied, because the probe keeps those of the first step. "
            f"Found a {type(value).__name__}: {error!r}. Leave it out of the batch, give the probe `probe_batches`, or "
            'pass `data="step"` to measure each step on its own batch.'
        ) from error


def cut(batch: Any) -> tuple[Any, Any]:
    """Returns both halves of a batch along the first dimension of its tensors.

    Raises:
        ValueError: If no tensor of the batch has a first dimension of at least 2.
    """
    # The first tensor counts the examples: tables that come with it may be longer.
    size = next((len(t) for t in tensors_of(batch) if t.dim()), 0)
    if size < 2:
        raise ValueError(
            "The data of a step should be divisible into halves: two or more micro-batches or `probe_batches`, or one "
            f"batch with at least 2 examples along the first dimension of its tensors. Found one batch of {size}."
        )
    middle = size // 2

    def part(chosen: slice) -> Any:
        return map_tensors(batch, lambda t: t[chosen] if t.dim() and t.shape[0] == size else t)

    return part(slice(0, middle)), part(slice(middle, size))


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested sequences, mappings and dataclasses, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        for value in batch:
            yield from tensors_of(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from tensors_of(getattr(batch, field.name))


def held_out(
    batches: Iterable[Any], seed: int, parameters: Sequence[Tensor], name: str = "probe_batches"
) -> list[MicroBatch]:
    """Returns batches that are all evaluated from one fixed random state, whatever the run draws meanwhile.

    Args:
        batches: The batches.
        seed: Seed of the random state.
        parameters: The coordinates x.
        name: Name of the argument, for the message.

    Raises:
        ValueError: If there are none.
    """
    devices = devices_of(parameters)
    before = RandomState.capture(devices)
    kept = list(batches)  # a loader draws random numbers to shuffle; the run must not miss them
    RandomState.seed(seed)
    fixed = RandomState.capture(devices)
    before.restore()
    if not kept:
        raise ValueError(f"Parameter `{name}` should hold at least one batch. Found none.")
    return [MicroBatch(batch, fixed) for batch in kept]


def devices_of(parameters: Sequence[Tensor]) -> list[torch.device]:
    """Returns the devices of the parameters that have random number generators of their own."""
    return sorted({p.device for p in parameters if p.device.type != "cpu"}, key=str)

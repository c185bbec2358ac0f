"""Tape: what a loop computes from the calls of its modules until backward, and the same computation once more.

A loop that nobody changes hands over no `loss_fn`. The tape stands in for one: it notes the calls of modules and,
around them, the functions of torch that lead to the tensor that backward is called on. Only what that tensor depends on
is computed again. Whether the result is the loss that the loop trains is for the probe's self-test to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from smoothdiag.measure.loss.batches import map_tensors, tensors_of
from smoothdiag.measure.loss.calls import Casts, autocast_as, present_casts

_WRITERS: Final = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__iand__", "__ior__")
"""Functions that write to their first argument although their names do not end in an underscore."""


class Unknown(Exception):
    """A part of the loss was computed where the tape does not see it."""


class Slot:
    """Stands for a tensor among the arguments of a call.

    Args:
        number: Number of the tensor.
    """

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True)
class Entry:
    """A call on the tape.

    Attributes:
        function: What was called.
        args: Its positional arguments, with slots for tensors.
        kwargs: Its arguments by name.
        reads: Numbers of the tensors that it was given.
        writes: Numbers of the tensors that it returned, in order.
        casts: The state of autocast.
        has_grad: Whether gradients were enabled.
        carries: Whether a gradient flows through it.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    reads: frozenset[int]
    writes: tuple[int, ...]
    casts: Casts
    has_grad: bool
    carries: bool


@dataclass(frozen=True)
class Given:
    """A tensor that no call on the tape has returned.

    Attributes:
        tensor: The tensor, or a copy if the tape itself writes to it.
        version: Its version then.
        is_copy: Whether it is such a copy.
        unknown: What has computed it, if gradients would flow through it to where the tape does not see.
    """

    tensor: Tensor
    version: int
    is_copy: bool
    unknown: str


class Tape:
    """The calls of one forward pass, and the tensors that backward was called on.

    Attributes:
        size: Length of the first dimension of the first tensor that a module was called with: the number of examples.
        roots: The tensors that backward was called on, by number.
        refusal: Why the loss cannot be computed again; empty if nothing speaks against it.
    """

    def __init__(self) -> None:
        self.size = 0
        self.roots: list[int] = []
        self.refusal = ""
        self._entries: list[Entry] = []
        self._given: dict[int, Given] = {}
        self._numbers: dict[int, int] = {}
        self._carried: set[int] = set()
        self._alive: list[Any] = []  # the number of a tensor is found by its identity, so it must not be freed
        self._needed: list[Entry] | None = None

    def __deepcopy__(self, memo: object) -> Tape:
        return self  # it is completed after the probe has been shown it

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a function, and notes the call if it takes or returns tensors."""
        if isinstance(function, nn.Module) and not self.size:
            self.size = size_of(args, kwargs)
        reads: set[int] = set()
        writes_to = _target(function, args)

        def slot(tensor: Tensor) -> Any:
            reads.add(number := self._number(tensor, keeps=tensor is writes_to))
            return Slot(number)

        # Containers may change later, so the tape keeps containers of its own.
        kept_args, kept_kwargs = map_tensors(args, slot), map_tensors(kwargs, slot)
        casts, has_grad = present_casts(), torch.is_grad_enabled()
        result = function(*args, **kwargs)
        writes = tuple(self._named(tensor) for tensor in tensors_of(result))
        if writes_to is not None and id(writes_to) in self._numbers:
            writes = (*writes, self._numbers[id(writes_to)])
        if writes:
            written = [*tensors_of(result), *([] if writes_to is None else [writes_to])]
            carries = any(tensor.requires_grad for tensor in written)
            self._carried |= {self._numbers[id(t)] for t in written if t.requires_grad and id(t) in self._numbers}
            entry = Entry(function, kept_args, kept_kwargs, frozenset(reads), writes, casts, has_grad, carries)
            self._entries.append(entry)
        return result

    def same(self, found: Any, given: Any) -> None:
        """Lets tensors stand for others, as scaled losses for what they were."""
        for one, other in zip(tensors_of(found), tensors_of(given), strict=True):
            self._numbers[id(one)] = self._number(other)
            self._alive.append(one)

    def end(self, root: Tensor) -> bool:
        """Notes a tensor that backward is called on; returns whether the tape has computed it."""
        number = self._number(root)
        if number in self._given:
            return False
        self.roots.append(number)
        self._needed = None
        try:
            self._slice()
        except Unknown as unknown:
            self.refusal = str(unknown)
        return True

    def replay(self, rows: slice | None) -> Tensor:
        """Computes the loss again, on all examples or on some of them.

        Raises:
            Unknown: If it cannot.
        """
        if self.refusal:
            raise Unknown(self.refusal)
        if not self.roots:
            raise Unknown("the loop has not called backward on anything that follows from this forward pass")
        values: dict[int, Tensor] = {}

        def value(number: int) -> Tensor:
            return values[number] if number in values else self._value(number, rows)

        for entry in self._slice():
            args, kwargs = (_filled(part, value) for part in (entry.args, entry.kwargs))
            with torch.set_grad_enabled(entry.has_grad), autocast_as(entry.casts):
                result = entry.function(*args, **kwargs)
            found = list(tensors_of(result))
            if rows is not None and not entry.reads:  # made for all examples, such as labels of ones
                found = [self._part(tensor, rows) for tensor in found]
            values.update(zip(entry.writes, found, strict=False))
        return torch.stack([values[root].reshape(()) for root in self.roots]).sum()

    def _slice(self) -> list[Entry]:
        """Returns the entries that the roots depend on, in their order."""
        if self._needed is None:
            needed, flows, found = set(self.roots), set(self.roots), []
            for entry in reversed(self._entries):
                if not needed.isdisjoint(entry.writes):
                    found.append(entry)
                    needed |= entry.reads
                    if entry.carries and not flows.isdisjoint(entry.writes):
                        flows |= entry.reads
            unknown = next((g.unknown for n in sorted(flows) if (g := self._given.get(n)) and g.unknown), "")
            if unknown:
                raise Unknown(f"a part of it comes from {unknown}, which no call of a module or function shows")
            self._needed = found[::-1]
        return self._needed

    def _value(self, number: int, rows: slice | None) -> Tensor:
        given = self._given[number]
        if given.is_copy:
            return self._part(given.tensor, rows).clone()
        if not given.tensor.requires_grad and _version(given.tensor) != given.version:
            raise Unknown("the loop has written to a tensor that the loss was computed from")
        return self._part(given.tensor, rows)

    def _part(self, tensor: Tensor, rows: slice | None) -> Tensor:
        """Returns the rows of a tensor that holds as many as there are examples, unless it belongs to a model."""
        is_data = tensor.dim() and len(tensor) == self.size and not isinstance(tensor, nn.Parameter)
        return tensor if rows is None or not is_data else tensor[rows]

    def _named(self, tensor: Tensor) -> int:
        """Returns the number of a tensor that a call has returned."""
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._alive)
            self._alive.append(tensor)
        return self._numbers[id(tensor)]

    def _number(self, tensor: Tensor, *, keeps: bool = False) -> int:
        """Returns the number of a tensor that a call is given; ``keeps`` copies it, because the call writes to it."""
        number = self._numbers.get(id(tensor), -1)
        # The forward of a torch.autograd.Function shows, but what it returns gets its gradient where nothing shows.
        is_changed = tensor.requires_grad and number not in self._carried and number not in self._given
        if number >= 0 and not is_changed:
            return number
        self._numbers.pop(id(tensor), None)
        number = self._named(tensor)
        unknown = tensor.grad_fn.name() if tensor.grad_fn is not None else ""
        is_copy = keeps and not tensor.requires_grad
        kept = tensor.detach().clone() if is_copy else tensor
        self._given[number] = Given(kept, _version(kept), is_copy, unknown)
        return number


@dataclass(frozen=True)
class Recorded:
    """A micro-batch for a probe: a tape, and which of its examples to compute.

    The probe cuts batches in half along the first dimension of their tensors, so ``examples`` tells what is left.
    """

    examples: Tensor
    tape: Tape

    @classmethod
    def of(cls, tape: Tape, size: int) -> Recorded:
        """Returns a tape with all of its examples."""
        return cls(torch.arange(size), tape)

    def loss(self) -> Tensor:
        """Returns the loss of the examples that are left.

        Raises:
            Unknown: If it cannot be computed again.
        """
        left, size = len(self.examples), self.tape.size
        if left == size:
            return self.tape.replay(None)
        first = int(self.examples[0])
        return self.tape.replay(slice(first, first + left))


def size_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Returns the length of the first dimension of the first tensor with one: the number of examples; 0 without."""
    return next((len(t) for t in tensors_of((args, kwargs)) if t.dim()), 0)


def _filled(arguments: Any, value: Callable[[int], Tensor]) -> Any:
    """Returns arguments with tensors in the place of slots."""

    def fill(found: Any) -> Any:
        return value(found.number) if type(found) is Slot else found

    return map_tensors(arguments, lambda tensor: tensor, fill)


def _target(function: Callable[..., Any], args: tuple[Any, ...]) -> Tensor | None:
    """Returns the tensor that a function of torch writes to; ``None`` if it writes to none."""
    name = getattr(function, "__name__", "")
    writes = (name.endswith("_") and not name.endswith("__")) or name in _WRITERS
    return args[0] if writes and args and isinstance(args[0], Tensor) else None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version

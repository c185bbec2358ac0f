"""State: what a forward pass may change in a model besides the coordinates, and how that is put back."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping, MutableMapping, Sequence, Set
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from smoothdiag import vectors
from smoothdiag.measure.loss.beside import Strays, modules_beside
from smoothdiag.measure.loss.bookkeeping import Books

Place = tuple[nn.Module, str]
"""A parameter is known by its place in a module and not by its tensor, which may be replaced."""

_COMPARABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that have a norm."""


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Returns ``list(model.parameters())``, in a third of the time."""
    held = (p for module in model.modules() for p in module._parameters.values() if p is not None)
    found: list[nn.Parameter] = vectors.unique(held)
    return found


def mark_of(tensor: Tensor) -> tuple[int, int]:
    """Returns what shows most writes to a tensor: how often it was written to, and where it lies."""
    part = vectors.local(tensor)
    # Only plain tensors lie in one place; quantised tensors, for example, do not.
    return tensor._version, part.data_ptr() if _is_plain(part) else 0


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns the norm of each tensor on its device, which shows writes through ``.data``; ``None`` if it has none."""
    parts = {i: part for i, part in enumerate(map(vectors.local, tensors)) if _is_plain(part)}
    parts = {i: part for i, part in parts.items() if part.dtype in _COMPARABLE and not part.is_meta}
    norms = torch._foreach_norm(list(parts.values()), 2, dtype=torch.float64) if parts else []
    found = dict(zip(parts, norms, strict=True))
    return [found.get(i) for i in range(len(tensors))]


def _is_plain(part: Tensor) -> bool:
    return type(part) is Tensor and part.layout is torch.strided


class ModuleState:
    """Knows what moves in a model besides x: buffers, and parameters that forward passes change (such as a teacher's).

    What other optimizers train is no part of it: its value at a step is not that before the forward pass.

    The modules are listed anew each time, because models change in mid-run: modules come and go, buffers are replaced,
    resized, or filled when they are first needed.

    Args:
        model: The model.
        loss_fn: The loss, which may call other modules too; their buffers move as well.

    Attributes:
        strays: The parameters outside the model that losses have reached.
        hands_on: Whether each gradient is complete when backward first reaches its parameter, as far as is known.
        is_known: Whether a loss has been evaluated, which shows what forward passes move. Until then all parameters
            outside x count as moving, unless they take more memory than x.
    """

    def __init__(self, model: nn.Module, loss_fn: Any = None) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._moving: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
        self._marks: dict[Place, tuple[Any, ...]] = {}
        self._norms: dict[Place, Tensor] = {}
        self.strays = Strays(model, loss_fn)
        self.is_known, self.hands_on = False, True

    def moves(self, module: nn.Module, name: str) -> bool:
        """Returns whether forward passes are known to change a parameter."""
        return name in self._moving.get(module, ())

    def snapshot(self, coordinates: Set[int], partners: Set[int] = frozenset()) -> Snapshot:
        """Returns the model as it is now, without the values of x and of what other optimizers train, given by ids."""
        beside = modules_beside(self._model, self._loss_fn)
        if self.is_known:
            return Snapshot(self._model, self._moving, coordinates | partners, beside)
        sizes = [0, 0]
        for p in parameters_of(self._model):
            sizes[id(p) in coordinates] += 0 if id(p) in partners else vectors.local(p).nbytes
        moving: Mapping[nn.Module, set[str]] = {
            module: set(module._parameters.keys()) for module in self._model.modules()
        }
        moving = moving if sizes[False] <= sizes[True] else self._moving
        return Snapshot(self._model, moving, coordinates | partners, beside)

    def mark(self, coordinates: Container[int]) -> None:
        """Remembers the content of the parameters outside x that are not known to move."""
        self._marks, self._norms = self._still(coordinates)

    def notice(self, coordinates: Container[int]) -> list[Tensor]:
        """Counts as moving the parameters replaced or written to since ``mark``, and returns them."""
        marks, norms = self._still(coordinates)
        changed = {place for place, found in marks.items() if self._marks.get(place, found) != found}
        # Writing through `.data` shows only in the values.
        both = [place for place in norms if place in self._norms and place not in changed]
        if both:
            now, then = (
                torch.stack([n[place].to(norms[both[0]].device) for place in both]) for n in (norms, self._norms)
            )
            changed |= {place for place, is_other in zip(both, (now != then).tolist(), strict=True) if is_other}
        for module, name in changed:
            self._moving.setdefault(module, set()).add(name)
        self._marks = {place: found for place, found in marks.items() if place not in changed}
        self._norms = {place: found for place, found in norms.items() if place not in changed}
        return [tensor for module, name in changed if (tensor := module._parameters[name]) is not None]

    def _still(self, coordinates: Container[int]) -> tuple[dict[Place, tuple[Any, ...]], dict[Place, Tensor]]:
        """Returns, for each tensor outside x not known to move, how often it was written to, and its norm."""
        tensors: dict[Place, Tensor] = {}
        for module in self._model.modules():
            moving = self._moving.get(module, ())
            for name, tensor in module._parameters.items():
                if tensor is not None and name not in moving and id(tensor) not in coordinates:
                    tensors[module, name] = tensor
        norms = zip(tensors, norms_of(list(tensors.values())), strict=True)
        marks = {place: (id(tensor), *mark_of(tensor)) for place, tensor in tensors.items()}
        return marks, {place: norm for place, norm in norms if norm is not None}


class Snapshot:
    """A model at one moment: modules, modes, buffers, parameters and attributes, and the values of what moves.

    Args:
        model: The model.
        moving: Names of parameters that forward passes change, by module.
        coordinates: Ids of the parameters x, whose values are left out.
        beside: Modules outside the model whose buffers and modes are kept as well.
    """

    def __init__(
        self,
        model: nn.Module,
        moving: Mapping[nn.Module, set[str]],
        coordinates: Container[int],
        beside: Sequence[nn.Module] = (),
    ) -> None:
        self._kept = [_Kept(module) for module in (*model.modules(), *beside)]
        self._needs_grad = [(p, p.requires_grad) for p in parameters_of(model)]
        self._books = Books(model)
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        for kept in self._kept:
            named = [*kept.buffers.values(), *map(kept.parameters.get, moving.get(kept.module, ()))]
            for tensor in named:
                if tensor is not None and id(tensor) not in coordinates and id(tensor) not in self._values:
                    self._values[id(tensor)] = tensor, tensor.detach().clone()
        self.adopted: set[int] = set()
        self._find_windows(p for p, _ in self._needs_grad if id(p) in coordinates)

    def holds(self, tensor: Tensor) -> bool:
        """Returns whether the snapshot can give a tensor its value back."""
        return id(tensor) in self._values

    def adopt(self, values: Iterable[tuple[Tensor, Tensor | None]], coordinates: Iterable[Tensor]) -> None:
        """Takes over values of parameters from another moment; ``None`` leaves a parameter as it will be found."""
        for tensor, value in values:
            self._values.pop(id(tensor), None)
            if value is not None:
                self._values[id(tensor)] = tensor, value
                self.adopted.add(id(tensor))
        self._find_windows(coordinates)

    def _find_windows(self, coordinates: Iterable[Tensor]) -> None:
        self._windows = self._values and _overlapping((tensor for tensor, _ in self._values.values()), coordinates)

    def cover(self, start: Snapshot) -> None:
        """Prepares to put back what going to ``start`` changes, also in objects that the model has dropped since."""
        self._books.cover(start._books)
        for key in start.adopted - self._values.keys():
            tensor, _ = start._values[key]
            self._values[key] = tensor, tensor.detach().clone()
        # What was not known to move at ``start`` begins with its present value.
        start._values = self._values | start._values

    def assign(self, *, widen: bool = False) -> None:
        """Takes the model to this moment for an evaluation; modules added since stay as they are.

        Values are written into the tensors that the model has now, which may be wider than they were.

        Args:
            widen: Whether float16 and bfloat16 tensors that the model no longer has are made anew in float32.
        """
        self._books.reopen()
        for kept in self._kept:
            kept.module.training = kept.mode
            buffers, parameters = _table(kept.module._buffers), _table(kept.module._parameters)
            for name in [name for name in buffers if name not in kept.buffers]:
                del buffers[name]
            for name, tensor in kept.buffers.items():
                if tensor is None:
                    if buffers.get(name) is not None:
                        buffers[name] = None
                else:
                    self._write(buffers, name, tensor, widen=widen)
            for name, tensor in kept.parameters.items():
                present = parameters.get(name)
                if present is tensor and id(tensor) not in self._values:
                    continue  # x, or a tensor that does not move
                if tensor is not None and present is not None:
                    self._write(parameters, name, tensor, widen=widen)

    def put_back(self) -> None:
        """Leaves the model exactly as it was: the same objects in the same places, with their former values."""
        self._books.put_back()
        for kept in self._kept:
            kept.put_back()
        for tensor, value in self._values.values():
            _copy_into(tensor, value)
        for parameter, needs_grad in self._needs_grad:
            if parameter.requires_grad != needs_grad:
                parameter.requires_grad_(needs_grad)

    def _write(self, store: MutableMapping[str, Any], name: str, tensor: Tensor, *, widen: bool) -> None:
        """Gives an entry the value that ``tensor`` had, in the entry's own tensor if that has the right shape."""
        present = store.get(name)
        if id(tensor) in self._windows or id(present) in self._windows:
            return  # another name of x, which is already where it should be
        _, value = self._values.get(id(tensor)) or self._values.get(id(present)) or (None, None)
        if value is None:
            return  # x, or a tensor that does not move
        if present is not None and present.shape == value.shape:
            _copy_into(present, value)
        else:
            store[name] = vectors.widened(value).clone() if widen else value.clone()


class _Kept:
    """The content of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.mode = module, module.training
        self.children: dict[str, nn.Module | None] = dict(module._modules.items())
        self.buffers: dict[str, Tensor | None] = dict(module._buffers.items())
        self.parameters: dict[str, Tensor | None] = dict(module._parameters.items())
        self._transient = set(getattr(module, "_non_persistent_buffers_set", ()))

    def put_back(self) -> None:
        module = self.module
        _refill(module._modules, self.children)
        _refill(module._buffers, self.buffers)
        _refill(module._parameters, self.parameters)
        if getattr(module, "_non_persistent_buffers_set", self._transient) != self._transient:
            module._non_persistent_buffers_set = self._transient
        module.training = self.mode


def _refill(store: MutableMapping[str, Any], entries: MutableMapping[str, Any]) -> None:
    """Gives a dictionary of a module its former entries in their order; writes nothing if nothing has changed."""
    if not isinstance(store, dict):
        return  # a scripted module, whose entries never change
    if list(store) != list(entries):
        for name in list(store):
            del store[name]
    for name, entry in entries.items():
        if name not in store or store[name] is not entry:
            store[name] = entry


def _table(store: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Returns a dictionary of a module; for a scripted module a copy, because it shows less than a dictionary."""
    return store if isinstance(store, dict) else dict(store.items())


def _overlapping(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> set[int]:
    """Returns the ids of the tensors that share memory with others."""
    spans = sorted(filter(None, map(_span, others)))
    found = set()
    for tensor in tensors:
        if spans and (span := _span(tensor)) is not None:
            at = bisect_left(spans, (span[1], 0)) - 1
            if at >= 0 and spans[at][1] > span[0]:
                found.add(id(tensor))
    return found


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """Returns where the memory of a tensor begins and ends, as if it had no gaps; ``None`` if that is unknown."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
        return None
    begin = tensor.data_ptr()
    return (begin, begin + tensor.nbytes) if begin else None


def _copy_into(tensor: Tensor, value: Tensor) -> None:
    """Copies a value into a tensor unseen by autograd, and undoes a change of the tensor's size."""
    if tensor.shape != value.shape:
        with torch.no_grad():
            tensor.resize_(value.shape)
    target, source = vectors.local(tensor).data, vectors.local(value)
    if type(target) is Tensor and target.layout is torch.strided and 0 in target.stride():
        for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
            if size > 1 and stride == 0:  # expanded: one place in memory under many indices
                target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    target.copy_(source)

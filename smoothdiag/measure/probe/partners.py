"""Partners: the parameters of a model that another optimizer trains, and the values that they had at a step."""

import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from smoothdiag import collectives, vectors
from smoothdiag.adapters import moved_by
from smoothdiag.console import counted
from smoothdiag.measure.loss.batches import MicroBatch
from smoothdiag.measure.loss.coordinates import fully_sharded
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.measure.loss.state import ModuleState, Place, mark_of, norms_of, parameters_of
from smoothdiag.memory import retried
from smoothdiag.rows import SmoothdiagWarning


@dataclass
class _Seen:
    """A partner in one backward pass.

    Attributes:
        place: Where it is in the model.
        tensor: The partner.
        mark: Shows whether it has been written to since.
        norm: Its norm.
        value: A copy of it; ``None`` if there is none.
        kept: Norm of the copy.
        is_early: Whether the copy was made before anybody was about to change the partner.
        is_hidden: Whether it was written to through ``.data``.
    """

    place: Place
    tensor: Tensor
    mark: tuple[int, int]
    norm: Tensor | None
    value: Tensor | None = None
    kept: Tensor | None = None
    is_early: bool = False
    is_hidden: bool = False


Sight = dict[int, _Seen]
"""All partners in one backward pass, by identity."""


class Partners:
    """Knows which values the partners had in the loop's backward passes.

    Nobody can write to what a loss needs between its forward and its backward pass. So these values belong to the step,
    however early its batch was shown. A partner is copied right before its optimizer steps; where nothing moves,
    nothing is copied. What the loop changes without an optimizer is copied in the backward pass as soon as that has
    been noticed. Before a loss has been evaluated, all partners are, unless they take more memory than x.

    Partners are the parameters outside x that train, and those of other optimizers that have stepped. What forward
    passes change, such as a teacher, is none: its value is that before the pass.

    Args:
        model: The model.
        state: Knows what forward passes change.
    """

    def __init__(self, model: nn.Module, state: ModuleState) -> None:
        self._model, self._state = model, state
        self._optimizers: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._by_hand: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
        self._unversioned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
        self._coordinates: Sequence[Tensor] = ()
        self._stale: list[tuple[int, int] | None] = []
        self._has_warned = False
        self._handles: list[RemovableHandle] = []
        # All optimizers of the process know this hook, and a loop may end between a batch and its step.
        weakref.finalize(self, _leave, self._handles)
        self._sights: dict[int, Sight] = {}
        self._fault: Exception | None = None
        self._number: Callable[[], int] = lambda: 0

    def arm(self, parameters: Sequence[nn.Parameter], number: Callable[[], int]) -> None:
        """Starts to follow backward passes and optimizers, unless all of the model's parameters are coordinates.

        Args:
            parameters: The coordinates x.
            number: Returns the number of the present micro-batch.
        """
        self.disarm()
        self._coordinates, self._number = parameters, number
        self._stale = self._gradients()
        ids = self._ids()
        if all(id(p) in ids for p in parameters_of(self._model)):
            return
        _remove(_LEFT)
        method = weakref.WeakMethod(self._before_step)
        self._handles.append(register_optimizer_step_pre_hook(lambda *given: (call := method()) and call(*given)))
        watched = [p for p in parameters if p.requires_grad and p.is_leaf and not vectors.is_sharded(p)]
        if watched:
            hook = torch.autograd.graph.register_multi_grad_hook(watched, self._on_backward, mode="any")
            self._handles.append(hook)

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Continues with other coordinates."""
        self._coordinates = parameters

    def disarm(self) -> None:
        """Removes the hooks and forgets all values."""
        _remove(self._handles)
        self._sights, self._fault = {}, None

    def ids(self) -> set[int]:
        """Returns the identities of the partners at present."""
        return {id(tensor) for _, tensor in self._present()}

    def settle(self, used: Mapping[int, MicroBatch]) -> list[MicroBatch]:
        """Returns the micro-batches of a step, to be evaluated with the values that the partners had.

        Args:
            used: The micro-batches by number.

        Raises:
            Exception: The error that prevented a copy, if there was one.
        """
        if self._fault is not None:
            raise self._fault
        if not self._sights:
            return list(used.values())
        latest, ids = self._latest(), self._ids()
        sights = [self._sights.get(number, latest) for number in used]
        sights = [{key: seen for key, seen in sight.items() if key not in ids} for sight in sights]
        changed = list(self._changed(sights))
        self._note([seen for seen in changed if seen.value is None or seen.is_early])
        values = _values(sights, {id(seen.tensor) for seen in changed if seen.value is not None})
        for micro, each in zip(used.values(), values, strict=True):
            if micro.state is not None:
                micro.state.adopt(each, self._coordinates)
        others = [{id(value): (tensor, value) for tensor, value in each if value is not None} for each in values]
        if all(each.keys() == others[0].keys() for each in others):
            return list(used.values())
        pairs = zip(used.values(), others, strict=True)
        return [replace(micro, others=list(each.values())) for micro, each in pairs]

    def _changed(self, sights: Sequence[Sight]) -> Iterator[_Seen]:
        """Yields the partners that have other values now, and drops copies of other values."""
        seen = [each for sight in sights for each in sight.values()]
        differs = {id(each) for each in seen if each.mark != mark_of(each.tensor)}
        # Writing through `.data` shows only in the values.
        known = zip(seen, norms_of([each.tensor for each in seen]), strict=True)
        triples = [
            (each, (each.norm, now, each.norm if each.kept is None else each.kept))
            for each, now in known
            if each.norm is not None and now is not None
        ]
        if triples:
            device = triples[0][1][0].device
            rows = [
                torch.stack([norm.to(device) for norm in row]) for row in zip(*(n for _, n in triples), strict=True)
            ]
            then, now, kept = collectives.read(rows, {}).reshape(3, -1)
            for (each, _), has_moved, is_other in zip(triples, _apart(then, now), _apart(then, kept), strict=True):
                each.is_hidden = is_other or (has_moved and id(each) not in differs)
                if has_moved:
                    differs.add(id(each))
                if is_other:
                    each.value = None
        yield from (each for each in seen if id(each) in differs)

    def _note(self, by_hand: Sequence[_Seen]) -> None:
        """Remembers which partners the loop changes without an optimizer, and warns once if a value is lost."""
        for seen in by_hand:
            module, name = seen.place
            self._by_hand.setdefault(module, set()).add(name)
            if seen.is_hidden:
                self._unversioned.setdefault(module, set()).add(name)
        lost = [seen for seen in by_hand if seen.value is None]
        if lost and not self._has_warned:
            self._has_warned = True
            number = counted(len({id(seen.tensor) for seen in lost}), "parameter")
            warnings.warn(
                f"Between the backward pass and the end of the step, the loop changed {number} of the model that the "
                "probe's optimizer does not hold, and no other optimizer's step did it. The probe had not kept the "
                "values, so it measures this step with the new ones; its rows on the step's own batch are "
                "`not_reproduced` if that makes a difference. From now on the probe keeps the values.",
                SmoothdiagWarning,
            )

    def _on_backward(self, gradient: Tensor) -> None:
        self._guarded(self._see)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._guarded(lambda: self._keep(optimizer, has_closure=len(args) > 1 or bool(kwargs)))

    def _guarded(self, call: Callable[[], None]) -> None:
        """Calls within the loop's own ``backward`` or ``step``, which must not end in an error of the probe."""
        if Objective.num_isolated:
            return  # a probe is measuring
        try:
            retried(call)
        except Exception as error:
            self._fault = error

    def _see(self) -> None:
        """Notes the partners as they are."""
        present, last = list(self._present()), self._latest()
        sizes = [sum(vectors.local(p).nbytes for p in part) for part in ([t for _, t in present], self._coordinates)]
        held = {id(p) for optimizer in self._optimizers for p in moved_by(optimizer)}
        is_first = not self._state.is_known and sizes[0] <= sizes[1]
        sight: Sight = {}
        for (place, tensor), norm in zip(present, norms_of([tensor for _, tensor in present]), strict=True):
            before, (module, name) = last.get(id(tensor)), place
            seen = _Seen(place, tensor, mark_of(tensor), norm)
            if before is not None and before.mark == seen.mark and name not in self._unversioned.get(module, ()):
                seen.value, seen.kept, seen.is_early = before.value, before.kept, before.is_early
            elif name in self._by_hand.get(module, ()) or (is_first and id(tensor) not in held):
                seen.value, seen.kept, seen.is_early = tensor.detach().clone(), norm, True
            sight[id(tensor)] = seen
        self._sights[self._number()] = sight

    def _keep(self, optimizer: torch.optim.Optimizer, *, has_closure: bool) -> None:
        """Copies what an optimizer is about to move."""
        if not self._sights and self._gradients() != self._stale:
            self._see()  # the hooks do not reach sharded gradients
        held, ids = moved_by(optimizer), self._ids()
        if not any(id(p) in ids for p in held):
            self._optimizers.add(optimizer)
        for p in held:
            if p.grad is None and not (has_closure and p.requires_grad):
                continue
            sights = [sight[id(p)] for sight in self._sights.values() if id(p) in sight]
            present = [seen for seen in sights if seen.mark == mark_of(p)]
            missing = [seen for seen in present if seen.value is None]
            if missing:
                value, (norm,) = p.detach().clone(), norms_of([p])
                for seen in missing:
                    seen.value, seen.kept = value, norm
            for seen in present:
                seen.is_early = False

    def _present(self) -> Iterator[tuple[Place, Tensor]]:
        ids = self._ids()
        held = {id(p) for optimizer in self._optimizers for p in moved_by(optimizer)}
        found, shards = set[int](), fully_sharded(self._model)
        for module in self._model.modules():
            for name, p in module._parameters.items():
                if p is None or id(p) in ids or id(p) in found or self._state.moves(module, name):
                    continue
                # Beside shards, whole tensors are gathered weights, whose memory goes with the next reshard.
                if (p.requires_grad or id(p) in held) and (not shards or vectors.is_sharded(p)):
                    found.add(id(p))
                    yield (module, name), p

    def _gradients(self) -> list[tuple[int, int] | None]:
        """Returns which gradients x has, and how often they were written to."""
        return [None if p.grad is None else (id(p.grad), p.grad._version) for p in self._coordinates]

    def _latest(self) -> Sight:
        return self._sights[max(self._sights)] if self._sights else {}

    def _ids(self) -> Collection[int]:
        return {id(p) for p in self._coordinates}


def _apart(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> list[bool]:
    """Returns where two norms differ; the norms of two tensors with NaN do not."""
    found: list[bool] = ((a != b) & ~(np.isnan(a) & np.isnan(b))).tolist()
    return found


_LEFT: list[RemovableHandle] = []
"""Hooks of partners that are gone; they do nothing. The next partners remove them: a garbage collection may come at any
time, and an optimizer that steps just then is going through all hooks."""


def _leave(handles: list[RemovableHandle]) -> None:
    _LEFT.extend(handles)
    handles.clear()


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _values(sights: Sequence[Sight], moved: Collection[int]) -> list[list[tuple[Tensor, Tensor | None]]]:
    """Returns the partners with their values in each sight; ``None`` for those that have not moved since any."""
    now: dict[int, Tensor] = {}
    found = []
    for sight in sights:
        found.append(part := list[tuple[Tensor, Tensor | None]]())
        for key, seen in sight.items():
            value = seen.value if key in moved else None
            if key in moved and value is None:
                value = now[key] = now[key] if key in now else seen.tensor.detach().clone()
            part.append((seen.tensor, value))
    return found

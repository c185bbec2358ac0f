"""Following: works out updates from what the optimizer keeps, so that no copy of the parameters is needed.

The update of Adam, say, follows from its averages. AutoClip compares what follows with a copy once. It does so again
when something has changed: parameters, options of the groups, entries of the state. To read a comparison waits for the
device, so on a device AutoClip compares only at steps that wait anyway, and keeps copies until then.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.adapters import Adapter, Joint
from smoothdiag.adapters.iterates import num_entries
from smoothdiag.adapters.updates import Formula, Stretch, Update
from smoothdiag.adapters.wrappers import pending_scale
from smoothdiag.autoclip.buckets import Bucket, buckets
from smoothdiag.autoclip.progression import is_in_progression
from smoothdiag.autoclip.rates import Number
from smoothdiag.autoclip.stretches import cut, is_on_device
from smoothdiag.memory import is_out_of_memory, retried
from smoothdiag.optim.arithmetic import lengths

KEPT = 2**20
"""Numbers of the update that are kept from its length to its shortening. All others are worked out a second time."""

FEW_CHECKS = 20
"""After this many comparisons with copies, further ones wait for the steps of the progression."""

AGREE = 1e-3
"""Largest distance between an update and its copy, as a share of its length, besides the rounding of x."""

ROUNDED = 1e-5
"""Rounding of a bound on a length: sums over a stretch are 1e-6 off at the most."""

ROUNDING = 8.0
"""Units in the last place of x that a copy may be off: the optimizer writes to x more than once."""


class Following:
    """Works out the updates of an optimizer.

    Args:
        optimizer: The optimizer.
        adapter: What the library knows about it.

    Attributes:
        was_long: Whether the last update was nearly as long as allowed, or longer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, adapter: Adapter) -> None:
        self._optimizer, self._adapter = optimizer, adapter
        self._parts: list[tuple[Formula, list[Tensor]]] = []
        self._options: list[dict[str, Any]] = []
        self._known: tuple[Any, ...] | None = None
        self._state: object = None
        self._num_checks = 0
        self._step = self._followed = -1  # this step, and the last one whose update was worked out
        self._counts_on_device = False
        self.was_long = False
        self._cut: list[list[Stretch]] = []
        self._kept: list[Update] = []
        self._moving: list[list[int]] = []

    def begin(self, step: int) -> bool:
        """Returns whether the update that comes can be worked out without a copy; call it right before the step.

        Args:
            step: Number of the step.
        """
        if step - 1 != self._followed:  # parameters of one stretch may have seen unequal numbers of steps since
            self._cut = []
        self._step = step
        if not retried(self._may_follow):
            self._parts = []
            return False
        known = self._known is not None and self._state is self._optimizer.state
        return known and self._known == self._description()

    def drop(self) -> None:
        """Lets go of the parameters, because the step is over or has failed."""
        self._parts, self._kept = [], []

    @torch.no_grad()
    def at_most(self, longest: Number) -> float:
        """Returns a length that the update does not exceed, if it is not above ``longest``, and else infinity.

        That costs half as much as the length itself. It works for Adam on a CPU: to read it would wait for a device.
        """
        if self.was_long or not all(formula.most for formula, _ in self._parts):
            return math.inf
        stretches = self._stretches()
        if any(s.owners[0].device.type != "cpu" or vectors.is_sharded(s.owners[0]) for _, s in stretches):
            return math.inf
        self._check_options()
        total = 0.0
        for formula, stretch in stretches:
            square = retried(lambda formula=formula, stretch=stretch: formula.most(stretch))  # type: ignore[misc]
            if not math.isfinite(square):  # 0 / 0 where gradients have been zero so far
                square = float(retried(lambda formula=formula, stretch=stretch: _square(formula.last(stretch))))  # type: ignore[misc]
            total += square
        most = (1 + ROUNDED) * math.sqrt(total)
        return most if most <= longest else math.inf

    @torch.no_grad()
    def length(self) -> Tensor:
        """Returns the length of the update; call it right after the step.

        Raises:
            RuntimeError: If options have changed since ``begin``, so that nobody knows by which the optimizer moved.
        """
        self._check_options()
        found: dict[int, Tensor] = {}
        owners: list[Tensor] = []
        self._kept, num_kept = [], 0
        for formula, stretch in self._stretches():
            update = retried(partial(formula.last, stretch))
            square = retried(partial(_square, update))
            if (num_kept := num_kept + update.direction.numel()) <= KEPT:
                self._kept.append(update)
            owner = stretch.owners[0]
            if id(owner) not in found:
                owners.append(owner)
            before = found.get(id(owner))
            found[id(owner)] = square if before is None else retried(lambda a=before, b=square: a + b)  # type: ignore[misc]
        return _total(self._optimizer, owners, found)

    @torch.no_grad()
    def take_back(self, share: Tensor) -> None:
        """Moves the parameters back by a share of the update."""
        kept = iter(self._kept)
        on_cpu = retried(lambda: float(share)) if share.device.type == "cpu" else None
        for formula, stretch in self._stretches():
            update = next(kept, None) or retried(partial(formula.last, stretch))
            if on_cpu is not None and not isinstance(update.factor, Tensor):
                retried(partial(stretch.add_, update.direction, -update.factor * on_cpu))
            else:
                back = retried(lambda update=update: _part_of(update, -share))  # type: ignore[misc]
                retried(partial(stretch.add_, back))

    @torch.no_grad()
    def check(self, back: Sequence[Bucket], step: int, *, may_wait: bool) -> bool:
        """Compares the update with a copy, and returns whether this one and the next ones can be worked out.

        Args:
            back: Copies of the parameters, minus the parameters.
            step: Number of the step.
            may_wait: Whether the step may wait for a device.
        """
        if not self._parts or (self._num_checks >= FEW_CHECKS and not is_in_progression(step)):
            return False
        if not may_wait and any(tensors[0].device.type != "cpu" for tensors, _ in back):
            return False
        self._num_checks += 1
        self._known, self._state, self._cut = None, self._optimizer.state, []
        ways = {id(p): way for tensors, owners in back for way, p in zip(tensors, owners, strict=True)}
        try:
            if self._has_same_options() and retried(self._has_one_count) and self._agrees(ways):
                self._known = self._description()
        except Exception as error:
            if not (is_out_of_memory(error) or isinstance(error, KeyError)):  # a subclass may keep other entries
                raise
        return self._known is not None

    def _may_follow(self) -> bool:
        optimizer, self._parts = self._optimizer, []
        if isinstance(optimizer, Joint):
            return False  # one of them may be left out of a step, and what it keeps tells its last update again
        if pending_scale(optimizer) is not None or getattr(optimizer, "found_inf", None) is not None:
            return False  # a GradScaler may skip the step
        for group in optimizer.param_groups:
            held = [p for p in group["params"] if p.grad is not None and p.requires_grad]
            if held:
                formula = self._adapter.update(group)
                if formula is None or not all(d.is_floating_point and d.itemsize >= 4 for d in {p.dtype for p in held}):
                    return False
                self._parts.append((formula, held))
        self._options = [_options(group) for group in optimizer.param_groups]
        return bool(self._parts)

    def _description(self) -> tuple[Any, ...]:
        """Returns what stays as it is as long as updates need no further comparison."""
        optimizer = self._optimizer
        kinds = [{name: _kind(value) for name, value in options.items()} for options in self._options]
        held = [list(map(id, group["params"])) for group in optimizer.param_groups]
        # Numbers of steps on a device are not read, so they must go on being equal.
        moving = [list(map(id, held)) for _, held in self._parts] if self._counts_on_device else None
        return type(optimizer), num_entries(optimizer), kinds, held, moving

    def _check_options(self) -> None:
        if not self._has_same_options():
            self._known, self._num_checks = None, FEW_CHECKS
            raise RuntimeError(
                "The options of an optimizer should stay as they are from the hooks before its step to the hooks after "
                "it. Found others after this step."
            )

    def _has_same_options(self) -> bool:
        groups = self._optimizer.param_groups
        return all(options == _options(group) for options, group in zip(self._options, groups, strict=False))

    def _has_one_count(self) -> bool:
        """Returns whether parameters have seen equally many steps, where numbers of steps are on a device."""
        counts = [self._optimizer.state.get(p, {}).get("step") for _, held in self._parts for p in held]
        there = [count for count in counts if is_on_device(count)]
        self._counts_on_device = bool(there)
        return not there or len(set(torch.stack([count.to(there[0].device) for count in there]).tolist())) == 1

    def _agrees(self, ways: Mapping[int, Tensor]) -> bool:
        found: list[Tensor] = []
        for formula, stretch in self._stretches():
            if any(id(p) not in ways for p in stretch.owners):
                return False

            def compared(formula: Formula = formula, stretch: Stretch = stretch) -> Tensor:
                way, x = stretch.flat([ways[id(p)] for p in stretch.owners]), stretch.parameter
                apart = _part_of(formula.last(stretch), 1.0).add_(way)
                unit = torch.finfo(x.dtype).eps
                return torch.stack([*lengths([apart, way]), lengths([x])[0] * (ROUNDING * unit)])

            found.append(retried(compared))
        return bool(found) and retried(lambda: _is_near(_together(found)))

    def _stretches(self) -> list[tuple[Formula, Stretch]]:
        self._followed = self._step
        if not self._cut or not retried(self._is_cut_right):
            self._cut = retried(lambda: [cut(held, self._optimizer.state) for _, held in self._parts])
            self._moving = [list(map(id, held)) for _, held in self._parts]
        pairs = zip(self._parts, self._cut, strict=True)
        return [(formula, stretch) for (formula, _), stretches in pairs for stretch in stretches]

    def _is_cut_right(self) -> bool:
        """Returns whether stretches hold the parameters that move, and what the optimizer keeps for them now."""
        state = self._optimizer.state
        return self._moving == [list(map(id, held)) for _, held in self._parts] and all(
            all(map(operator.is_, map(state.get, s.owners), s.states)) for stretches in self._cut for s in stretches
        )


def _together(rows: Sequence[Tensor]) -> Tensor:
    """Returns equally long rows of any device as one tensor on the CPU; waits for the device once."""
    device = rows[0].device
    return torch.stack([row.to(device, vectors.widest(device)) for row in rows]).cpu()


def _is_near(lengths: Tensor) -> bool:
    """Returns whether updates agree with copies, from lengths of difference, copy and rounding in every stretch."""
    apart, way, rounding = lengths.unbind(1)
    # A step that is nearly lost in the rounding of x tells nothing.
    return bool((apart <= AGREE * way + rounding).all()) and bool(rounding.norm() <= 0.05 * way.norm())


def _square(update: Update) -> Tensor:
    found = torch.dot(update.direction, update.direction)  # of positive numbers at most 1e-6 off in a stretch on a CPU
    return found.to(vectors.widest(found.device)) * update.factor**2


def _part_of(update: Update, share: float | Tensor) -> Tensor:
    """Returns a share of the update, in the memory of its direction."""
    if isinstance(share, Tensor):
        share = share.to(update.direction.device)
    return update.direction.mul_(update.factor * share)


def _total(optimizer: torch.optim.Optimizer, owners: Sequence[Tensor], squares: Mapping[int, Tensor]) -> Tensor:
    """Returns the root of a sum of squares over all ranks."""
    if any(map(vectors.is_sharded, owners)):
        # Ranks sum over the same parameters in the same order, even if one of them went by a copy.
        held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        zero = retried(lambda: torch.zeros_like(next(iter(squares.values()))))
        parts = [
            ([squares.get(id(p), zero.to(local.device)) for local, p in zip(tensors, found, strict=True)], found)
            for tensors, found in buckets(held, held)
        ]
        return vectors.total(parts).sqrt()  # once: the other ranks do not repeat their part of the sum
    by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for p in owners:
        values, found = by_device.setdefault(p.device, ([], []))
        values.append(squares[id(p)])
        found.append(p)
    return retried(lambda: vectors.total(list(by_device.values())).sqrt())


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a group in a form that can be compared without waiting for a device."""
    return {name: _mark(value) for name, value in group.items() if name != "params"}


def _mark(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_mark, value))
    return (Tensor, id(value), value._version) if isinstance(value, Tensor) else value


def _kind(value: Any) -> Any:
    """Returns what of an option may change the formula: not how large a number is, unless it is zero."""
    if isinstance(value, tuple):
        return Tensor if value[:1] == (Tensor,) else tuple(map(_kind, value))
    return value == 0 if isinstance(value, float) else value

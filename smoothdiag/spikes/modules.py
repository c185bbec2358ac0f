"""Modules: the gradient norm of each module as a signal of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.distributed as dist
from torch import Tensor

from smoothdiag import arguments, vectors
from smoothdiag.adapters import moved_by, parameter_names
from smoothdiag.autoclip.buckets import buckets, multiply, unscaled
from smoothdiag.measure.probe import Probe
from smoothdiag.optim.arithmetic import lengths
from smoothdiag.spikes.events import OF_MODULE
from smoothdiag.spikes.robust import Alone
from smoothdiag.spikes.signals import MISSING, named
from smoothdiag.spikes.statistics import Judged, Statistics
from smoothdiag.spiking import SpikeRule

SHOWN = 8
"""Names that an error lists."""

Modules = bool | Sequence[str]
"""Whether to watch modules, or which."""


def module_of(modules: Modules) -> Callable[[str], str]:
    """Returns what gives the module of a parameter by its name; empty if it belongs to none that is watched."""
    if isinstance(modules, bool):
        return lambda name: name.rpartition(".")[0] or name
    return lambda name: next((m for m in modules if f"{name}.".startswith(f"{m}.")), "")


class ModuleNorms:
    """Measures and clips the gradient norms of modules.

    Args:
        optimizer: The optimizer.
        probe: Knows the names of the parameters; ``None`` leaves those that the optimizer was made with.
        modules: True for each module that holds parameters itself, or names of modules.
        rule: What a spike is.
        multiple: What a spike is clipped to, in usual norms.

    Raises:
        ValueError: If a name is of no module, if one module is part of another, or if nobody knows the names.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, probe: Probe | None, modules: Modules, rule: SpikeRule, multiple: float
    ) -> None:
        self._optimizer, self._rule, self._multiple = optimizer, rule, multiple
        known = _known(optimizer, probe)
        if not isinstance(modules, bool):
            _check(modules, [name for name, _ in known])
        label = module_of(modules)
        self._modules = list(dict.fromkeys(module for name, _ in known if (module := label(name))))
        places = {module: place for place, module in enumerate(self._modules)}
        # The parameters are held, so that no other tensor gets their identity.
        self._places = {id(p): (places[module], p) for name, p in known if (module := label(name))}
        self.names = tuple(OF_MODULE + named(module) for module in self._modules)

    def values(self, step: int, seen: Tensor, shown: Tensor | None) -> Tensor:
        """Returns the norm of each module, as it was before the loop clipped; `MISSING` without a gradient."""
        parts = self._gradients()
        found = unscaled(self._optimizer, _norms(parts, seen))
        if shown is not None:
            share = shown.to(seen, non_blocking=True) / seen
            found = found * torch.where(share.isfinite() & (share > 0), share, torch.ones_like(share))
        absent = torch.full_like(seen, MISSING)
        return torch.stack([norm if part else absent for norm, part in zip(found.unbind(), parts, strict=True)])

    def make(self, device: torch.device) -> Statistics:
        """Returns statistics that judge each module alone."""
        return Alone(len(self.names), 0, device, self._rule, self._multiple)

    def clip(self, judged: Judged) -> None:
        """Scales the gradient of each module that spikes to the usual norm of that module."""
        if judged.fired.device.type == "cpu" and not judged.fired.any():
            return
        parts = self._gradients()
        norms = unscaled(self._optimizer, _norms(parts, judged.target))
        wanted = (judged.target / norms).clamp(max=1.0).nan_to_num(1.0)
        scales = torch.where(judged.fired, wanted, torch.ones_like(wanted)).unbind()
        for part, scale in zip(parts, scales, strict=True):
            for grads, _ in buckets(part, part):
                multiply(grads, scale)

    def _gradients(self) -> list[list[Tensor]]:
        parts: list[list[Tensor]] = [[] for _ in self._modules]
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) in self._places:
                    parts[self._places[id(p)][0]].append(p.grad)
        return parts


def _known(optimizer: torch.optim.Optimizer, probe: Probe | None) -> list[tuple[str, Tensor]]:
    if probe is not None:
        held = moved_by(optimizer)
        found = [(name, held[i]) for name, places in probe.modules(lambda name: name).items() for i in places]
        return [(name, p) for name, p in found if name]
    if found := parameter_names(optimizer):
        return list(found)
    raise ValueError(
        "Parameter `modules` should be left out where nobody knows the names of the parameters. Pass a probe, or make "
        "the optimizer from `model.named_parameters()`. Found parameters without names."
    )


def _check(modules: Sequence[str], names: Sequence[str]) -> None:
    is_list = isinstance(modules, Sequence) and not isinstance(modules, str) and len(modules)
    if not is_list or not all(isinstance(module, str) and module for module in modules):
        raise arguments.wrong("modules", "True, or a list of names of modules", modules)
    for one, other in combinations(modules, 2):
        if f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}."):
            raise ValueError(
                "Parameter `modules` should name modules of which none is part of another: a gradient counts once. "
                f"Found {one!r} and {other!r}."
            )
    for module in modules:
        if not any(f"{name}.".startswith(f"{module}.") for name in names):
            own = list(dict.fromkeys(map(module_of(True), names)))
            more = f", and {len(own) - SHOWN} more" if len(own) > SHOWN else ""
            raise ValueError(
                f"Parameter `modules` should name modules whose parameters the optimizer moves. Found {module!r}, and "
                f"parameters in {', '.join(own[:SHOWN])}{more}."
            )


def _norms(parts: Sequence[Sequence[Tensor]], like: Tensor) -> Tensor:
    """Returns the norm of each list of gradients over all ranks, without waiting; 0 for an empty list."""
    total = torch.zeros(len(parts), dtype=like.dtype, device=like.device)
    for ranks in dict.fromkeys(vectors.shard_groups(grad) for part in parts for grad in part):
        held = [[vectors.local(grad) for grad in part if vectors.shard_groups(grad) == ranks] for part in parts]
        squares = _squares(held, like)
        for group in ranks:
            dist.all_reduce(squares, group=group)
        total += squares
    return total.sqrt()


def _squares(parts: Sequence[Sequence[Tensor]], like: Tensor) -> Tensor:
    tensors = [x for part in parts for x in part]
    found: dict[int, Tensor] = {}
    kinds: dict[object, list[int]] = {}
    for place, x in enumerate(tensors):
        kinds.setdefault((x.dtype, x.device), []).append(place)
    for places in kinds.values():
        norms = torch.stack(lengths([tensors[place] for place in places])).to(like, non_blocking=True)
        found |= zip(places, norms.unbind(), strict=True)
    # The norm of the norms of a module is its norm; one operation makes it for all modules.
    flat = torch.stack([found[place] for place in range(len(tensors))])
    sizes = [len(part) for part in parts if part]
    norms_of = iter(torch._foreach_norm(torch.split(flat, sizes), 2))
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return torch.stack([next(norms_of) if part else zero for part in parts]).square()

"""Uses: whether a step uses the gradients that a clip has limited, and what of the step no clip has seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from smoothdiag.doctor.findings import Fault, Finding, finding
from smoothdiag.doctor.gradients import Held, Mark, Owner, can_be_read, has_entries, is_kept
from smoothdiag.doctor.sites import Site

ENOUGH: Final = 3
"""Steps needed to call a line wrong, because one or two steps may be skipped on purpose."""


@dataclass
class _Line:
    """The clips of one line, and what became of them.

    Attributes:
        limit: Its latest threshold.
        by_value: Whether the threshold is one for single entries.
        clips: How many clips there were.
        waiting: The gradients of its latest clip, until a step uses them or somebody throws them away.
        is_used: Whether a step has used a gradient of this line.
        unused: How often the gradients were thrown away while another gradient stepped that no clip had seen.
        is_outside: Whether the closure of a step threw them away.
        is_beside: Whether such a step came since the latest clip.
        is_dropped: Whether the gradients were thrown away since the latest clip.
        parts: Steps of which the line limited one part while the rest was longer than its threshold.
        wholes: Steps of which it limited everything, alone or together with other lines.
        mixed: The gradients of its latest clip, if it was given those of several optimizers; without those that
            stepped since.
        has_mixed: Whether one of these optimizers has stepped since.
        extra: How often the others' gradients were thrown away.
        shared: How often all of them were used.
        left: How many gradients of the step no clip had seen, and how many there were.
        longest: The largest norm of the rest.
    """

    limit: float = 0.0
    by_value: bool = False
    clips: int = 0
    waiting: dict[Held, Mark] = field(default_factory=dict)
    is_used: bool = False
    unused: int = 0
    is_outside: bool = False
    is_beside: bool = False
    is_dropped: bool = False
    parts: int = 0
    wholes: int = 0
    mixed: dict[Held, Mark] = field(default_factory=dict)
    has_mixed: bool = False
    extra: int = 0
    shared: int = 0
    left: tuple[int, int] = (0, 0)
    longest: float = 0.0

    def look(self) -> None:
        """Looks whether the gradients were thrown away."""
        if not any(is_kept(each.gradient, mark) for each, mark in self.waiting.items()):
            self.is_dropped = True
            for each in self.waiting:
                each.clipped = None

    def settle(self) -> None:
        """Counts gradients that were thrown away."""
        if self.is_dropped and self.is_beside:
            self.unused += 1
            self.waiting = {}

    def settle_mixed(self) -> None:
        """Counts gradients that only made the norm longer."""
        if self.mixed and not any(is_kept(each.gradient, mark) for each, mark in self.mixed.items()):
            self.extra += self.has_mixed
            self.mixed = {}


class Uses:
    """Follows clipped gradients up to the step that uses them."""

    def __init__(self) -> None:
        self._lines: dict[Site, _Line] = {}

    def clip(self, site: Site, held: Sequence[Held], limit: float, *, by_value: bool) -> None:
        """Records a clip that was in time."""
        line = self._lines.setdefault(site, _Line())
        line.limit, line.by_value = limit, by_value
        line.clips += 1
        if not line.shared:
            line.mixed, line.has_mixed = {}, False
            if len({each.owner for each in held}) > 1 and not by_value:
                there = [each for each in held if not each.is_used_up and has_entries([each.gradient])]
                if len({each.owner for each in there}) > 1:
                    line.mixed = {each: Mark(each.gradient, site) for each in there}
        if line.is_used:
            return
        line.waiting = {each: Mark(each.gradient, site) for each in held if each.gradient is not None}
        line.is_beside = line.is_dropped = False

    def before_backward(self) -> None:
        """Looks for gradients that were thrown away."""
        for line in self._lines.values():
            line.settle_mixed()
        for line in self._open():
            line.look()
            line.settle()

    def before_step(self, stepping: Iterable[Held]) -> None:
        """Records which lines have limited the gradients that a step is about to use."""
        mixed = [line for line in self._lines.values() if line.mixed]
        lines = [line for line in self._open() if not line.is_dropped]
        if not lines and not mixed:
            return
        gradients = {id(each.gradient) for each in stepping}  # a worker may lend its own to a shared model
        for line in mixed:
            rest = {each: mark for each, mark in line.mixed.items() if id(mark.gradient) not in gradients}
            line.has_mixed = line.has_mixed or len(rest) < len(line.mixed)
            line.shared += not rest
            line.mixed = rest
        for line in lines:
            if any(id(mark.gradient) in gradients and is_kept(mark.gradient, mark) for mark in line.waiting.values()):
                line.is_used, line.waiting = True, {}
            else:
                line.look()

    def after_step(self, owner: Owner, held: Sequence[Held]) -> None:
        """Records what a step has used; ``held`` are the parameters of its optimizer."""
        if all(line.is_used and line.wholes for line in self._lines.values()):  # nothing left to find out
            owner.was_clipped = any(each.is_limited for each in held)
            return
        stepping = [each for each in held if each.gradient is not None]
        self.before_step(stepping)  # a closure or a hook may have clipped
        seen = [each for each in stepping if each.is_limited]
        owner.was_clipped = bool(seen)
        if seen:
            self._parts(stepping, seen)
            return
        for line in self._open():
            line.is_beside = True
            line.is_outside = line.is_outside or (line.is_dropped and owner.makes_gradients)
            line.settle()

    def meant(self, owner: Owner) -> None:
        """Records that a GradScaler decides about a step: clipped gradients were meant for it even if it is skipped."""
        for line in self._open():
            if any(each.owner is owner for each in line.waiting):
                line.is_used, line.waiting = True, {}

    def findings(self) -> list[Finding]:
        """Returns the lines whose gradients no step uses, and those that limit one part of a step."""
        found = []
        for site, line in self._lines.items():
            if line.unused >= ENOUGH and not line.is_used:
                fault = Fault.STALE_GRADIENTS if line.is_outside else Fault.CLIP_OF_UNUSED_GRADIENTS
                found.append(finding(fault, site, line.unused, line.clips, unit="clips"))
            if line.extra >= ENOUGH and not line.shared:
                facts = "gradients of another optimizer"
                fault = Fault.CLIP_WITH_UNUSED_GRADIENTS
                found.append(finding(fault, site, line.extra, line.clips, unit="clips", facts=facts))
            if line.parts >= ENOUGH and not line.wholes:
                number, of = line.left
                kind = "entries up to" if line.by_value else "a norm of up to"
                facts = (
                    f"{number} of the {of} gradients that the step used had not been clipped. They had {kind} "
                    f"{line.longest:.3g}; the threshold is {line.limit:.3g}"
                )
                found.append(finding(Fault.CLIP_OF_A_PART, site, line.parts, line.clips, unit="clips", facts=facts))
        return found

    def _open(self) -> list[_Line]:
        return [line for line in self._lines.values() if line.waiting and not line.is_used]

    def _parts(self, stepping: Sequence[Held], seen: Sequence[Held]) -> None:
        limited = set(seen)
        rest = [each for each in stepping if each not in limited]
        sites = {each.clipped.site for each in seen if each.clipped is not None}
        lines = [line for site, line in self._lines.items() if site in sites]
        if not rest:
            for line in lines:
                line.wholes += 1
            return
        open_lines = [line for line in lines if not line.wholes]
        gradients = [each.gradient for each in rest if each.gradient is not None]
        if not open_lines or not can_be_read(gradients):
            return
        for line in open_lines:
            length = _largest(gradients) if line.by_value else _norm(gradients)
            if length > line.limit:
                line.parts += 1
                line.left, line.longest = (len(rest), len(stepping)), max(line.longest, length)


def _norm(gradients: list[Tensor]) -> float:
    norms = torch._foreach_norm([each.detach().to(torch.float32) for each in gradients])
    return float(torch.stack([each.cpu() for each in norms]).norm())


def _largest(gradients: list[Tensor]) -> float:
    return max(float(each.abs().max()) for each in gradients if each.numel())

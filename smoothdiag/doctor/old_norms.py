"""Old norms: total norms that a clip is given although they belong to other gradients."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from smoothdiag.doctor.gradients import Held, Mark
from smoothdiag.doctor.sites import Site

_KEPT: Final = 64
"""How many norms to remember; a clip is given one that was measured shortly before."""


@dataclass(frozen=True)
class _Norm:
    value: weakref.ref[Tensor]
    site: Site
    marks: dict[Held, Mark]
    passes: int
    is_scaled: bool


class OldNorms:
    """Remembers norms and the gradients that they were measured on."""

    def __init__(self) -> None:
        self._norms: dict[int, _Norm] = {}

    def read(self, held: Iterable[Held], site: Site, value: Any, passes: int) -> None:
        """Records a norm; ``passes`` counts the backward passes so far."""
        if not isinstance(value, Tensor):
            return
        marks = {each: Mark(each.gradient, site) for each in held}
        self._norms.pop(id(value), None)
        self._norms[id(value)] = _Norm(weakref.ref(value), site, marks, passes, _is_scaled(marks))
        if len(self._norms) > _KEPT:
            self._norms.pop(next(iter(self._norms)))

    def cause(self, held: Sequence[Held], value: Any, passes: int) -> tuple[Site, str] | None:
        """Returns where a norm was measured and on what, if it belongs to other gradients than those of ``held``."""
        norm = self._norms.get(id(value))
        if norm is None or norm.value() is not value:
            return None
        if not norm.marks.keys() & {*held}:
            return norm.site, "on gradients of other parameters"
        if norm.is_scaled and not _is_scaled(held):  # unscale_ moves no version counter
            return norm.site, "while the gradients were still multiplied by the factor of the GradScaler"
        if passes > norm.passes and not any(mark.holds(each.gradient) for each, mark in norm.marks.items()):
            return norm.site, "before the latest backward pass, on gradients that have changed since"
        return None


def _is_scaled(held: Iterable[Held]) -> bool:
    return any(each.owner.scaled for each in held)

"""Micro-batches: clipped gradients to which a backward pass has added."""

from __future__ import annotations

from collections.abc import Iterable

from smoothdiag.doctor.gradients import Held, Mark, Owner, is_kept
from smoothdiag.doctor.sites import Site


class MicroBatches:
    """Follows clipped gradients through backward passes, up to the step that uses them."""

    def __init__(self) -> None:
        self._at_risk: dict[Held, None] = {}
        self._spoiled: dict[tuple[Held, Site], Mark] = {}

    def before_backward(self, held: Iterable[Held]) -> None:
        """Records which gradients are clipped, and forgets those that were thrown away."""
        self._spoiled = {key: mark for key, mark in self._spoiled.items() if is_kept(key[0].gradient, mark)}
        self._at_risk = dict.fromkeys(each for each in held if each.live("clipped") and not each.is_used_up)

    def before_clip_in_backward(self, held: Iterable[Held]) -> None:
        """Looks at gradients that a hook is about to clip as soon as they are there."""
        self._look(each for each in held if each in self._at_risk)

    def after_backward(self) -> None:
        """Looks which clipped gradients the backward pass has changed."""
        self._look(self._at_risk)
        self._at_risk = {}

    def lines(self, owner: Owner, *, by_hand: bool = False) -> list[Site]:
        """Returns the lines whose clipped gradients were added to, and are still there for the step of ``owner``.

        An update ``by_hand`` is noticed after its gradients may have been zeroed.
        """
        mine = ((key, mark) for key, mark in self._spoiled.items() if key[0].owner is owner)
        return [site for (each, site), mark in mine if by_hand or mark.is_of(each.gradient)]

    def forget(self, owner: Owner) -> None:
        """Forgets the gradients that ``owner`` has used."""
        self._spoiled = {key: mark for key, mark in self._spoiled.items() if key[0].owner is not owner}

    def _look(self, held: Iterable[Held]) -> None:
        for each in held:
            if each.clipped is not None and not each.live("clipped"):
                self._spoiled[each, each.clipped.site] = Mark(each.gradient, each.clipped.site)

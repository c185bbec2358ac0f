"""Twice: gradients that two lines clip for one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from smoothdiag.doctor.gradients import Held, Owner
from smoothdiag.doctor.sites import Site
from smoothdiag.doctor.uses import ENOUGH


class Twice:
    """Follows clips by the norm that get the same gradients as the clip before them.

    A line that clips some of the gradients by themselves, as with one network after the other, may be followed by one
    that clips all of them. Two lines with norms of different kinds may also both be meant.
    """

    def __init__(self) -> None:
        self._latest: dict[Site, tuple[set[Held], float]] = {}
        self._calls: Counter[Site] = Counter()
        self._pairs: Counter[tuple[Site, Site]] = Counter()
        self._waiting: dict[tuple[Site, Site], set[Owner]] = {}

    def clip(self, held: Sequence[Held], site: Site, norm_type: float) -> None:
        """Records a clip by the norm before it runs."""
        there = {each for each in held if each.gradient is not None}
        marks = [each.live("clipped") for each in there]
        lines = {None if mark is None else mark.site for mark in marks}
        first = lines.pop() if len(lines) == 1 else None
        if first is not None and first != site and self._latest.get(first) == (there, norm_type):
            self._waiting[first, site] = {each.owner for each in there}
        self._latest[site] = (there, norm_type)
        self._calls[site] += 1

    def step(self, owner: Owner) -> None:
        """Counts the clips whose gradients a step has used."""
        for pair in [pair for pair, owners in self._waiting.items() if owner in owners]:
            self._pairs[pair] += 1
            del self._waiting[pair]

    def lines(self) -> Iterator[tuple[Site, Site, int, int]]:
        """Yields pairs of lines of which the second always follows the first: how often, and of how many clips.

        A second clip that a condition guards, such as one for very long gradients, is meant.
        """
        for (first, second), number in self._pairs.items():
            if number >= max(ENOUGH, self._calls[first] - 1):
                yield first, second, number, self._calls[second]

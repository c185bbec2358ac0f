"""Rarity: the distances of the last steps, on the device, and which distance is rare beside them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from smoothdiag.spiking import SpikeRule
from smoothdiag.tails import AFTERMATH, FAR_FROM_ALL, FEWEST_OF_TAIL, FREQUENT, TAIL


class LastDistances:
    """The last distances of some series, compared with each new one without waiting for the device.

    Args:
        series: How many series are judged, each alone. Together they may fire as often by chance as one.
        rule: The rule.
        options: Type and device.
    """

    def __init__(self, series: int, rule: SpikeRule, options: dict[str, Any]) -> None:
        self._size, self._largest, self._far = rule.memory, rule.largest, rule.deviations
        self._excesses = rule.excesses + math.log(series or 1)
        self._most = int(TAIL * rule.memory)
        whole = {"dtype": torch.int64, "device": options["device"]}
        self._distances = torch.full((series, rule.memory), -math.inf, **options)
        self._counts = torch.zeros(series, **whole)
        self._begin, self._last = (torch.full((series,), -rule.memory - AFTERMATH, **whole) for _ in range(2))
        self._places = torch.arange(self._most + 1, device=options["device"])

    @property
    def kept(self) -> dict[str, Tensor]:
        """The tensors of the state, by name."""
        return {
            "distances": self._distances,
            "distance_counts": self._counts,
            "event_begin": self._begin,
            "event_last": self._last,
        }

    def are_rare(self, distances: Tensor, enters: Tensor) -> Tensor:
        """Returns which distances are rare beside those before, and keeps those that enter.

        `smoothdiag.tails.events` says which steps are one event, whose largest distance stays where it began.

        Args:
            distances: One distance for each series.
            enters: Which of them count.
        """
        distances = distances.clamp(max=self._largest)
        is_far = enters & (distances > self._far)
        goes_on = is_far & (self._counts - self._last <= AFTERMATH)
        event, is_kept = self._at(self._begin), goes_on & (self._counts - self._begin < self._size)
        self._put(self._begin, is_kept, torch.full_like(event, -math.inf))  # an event is not compared with itself
        is_rare = distances > self._asked()
        self._put(self._begin, is_kept, torch.maximum(distances, event))
        self._put(self._counts, enters, distances.masked_fill(goes_on, -math.inf))
        self._begin = torch.where(is_far & ~goes_on, self._counts, self._begin)
        self._last = torch.where(is_far, self._counts, self._last)
        self._counts += enters
        return is_rare

    def _at(self, places: Tensor) -> Tensor:
        return self._distances.gather(1, places.remainder(self._size).unsqueeze(1)).squeeze(1)

    def _put(self, places: Tensor, which: Tensor, values: Tensor) -> None:
        new = torch.where(which, values, self._at(places)).unsqueeze(1)
        self._distances.scatter_(1, places.remainder(self._size).unsqueeze(1), new)

    def _asked(self) -> Tensor:
        """Returns from where on a distance is rare; `smoothdiag.tails.rare` says the same of many steps."""
        largest = self._distances.topk(self._most + 1, dim=1).values
        size = (TAIL * (self._distances > -math.inf).sum(dim=1, keepdim=True)).long()
        begin = largest.gather(1, size)
        within = torch.where(self._places < size, largest - begin, 0.0)
        asked = begin + within.sum(dim=1, keepdim=True) / size.clamp(min=1) * self._excesses
        asked = torch.minimum(asked, FAR_FROM_ALL * largest.narrow(1, 0, 1))
        asked = torch.maximum(asked, largest.narrow(1, FREQUENT - 1, 1))
        return torch.where(size < FEWEST_OF_TAIL, -math.inf, asked).squeeze(1)

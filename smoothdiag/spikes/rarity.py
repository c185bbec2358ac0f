"""Rarity: the distances of the last steps, on the device, and which distance is rare beside them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from smoothdiag.spiking import SpikeRule
from smoothdiag.tails import FAR_FROM_ALL, FEWEST_OF_TAIL, TAIL


class LastDistances:
    """The last distances of some series, compared with each new one without waiting for the device.

    Args:
        series: How many series are judged, each alone. Together they may fire as often by chance as one.
        rule: The rule.
        options: Type and device.
    """

    def __init__(self, series: int, rule: SpikeRule, options: dict[str, Any]) -> None:
        self._size, self._largest = rule.memory, rule.largest
        self._excesses = rule.excesses + math.log(series or 1)
        self._most = int(TAIL * rule.memory)
        self._distances = torch.full((series, rule.memory), -math.inf, **options)
        self._counts = torch.zeros(series, dtype=torch.int64, device=options["device"])
        self._places = torch.arange(self._most + 1, device=options["device"])

    @property
    def kept(self) -> dict[str, Tensor]:
        """The tensors of the state, by name."""
        return {"distances": self._distances, "distance_counts": self._counts}

    def are_rare(self, distances: Tensor, enters: Tensor) -> Tensor:
        """Returns which distances are rare beside those before, and keeps those that enter.

        Args:
            distances: One distance for each series.
            enters: Which of them count.
        """
        distances = distances.clamp(max=self._largest)
        is_rare = distances > self._asked()
        place = self._counts.remainder(self._size).unsqueeze(1)
        before = self._distances.gather(1, place)
        self._distances.scatter_(1, place, torch.where(enters.unsqueeze(1), distances.unsqueeze(1), before))
        self._counts += enters
        return is_rare

    def _asked(self) -> Tensor:
        """Returns from where on a distance is rare; `smoothdiag.tails.rare` says the same of many steps."""
        largest = self._distances.topk(self._most + 1, dim=1).values
        size = (TAIL * self._counts.clamp(max=self._size)).long().unsqueeze(1)
        begin = largest.gather(1, size)
        within = torch.where(self._places < size, largest - begin, 0.0)
        asked = begin + within.sum(dim=1, keepdim=True) / size.clamp(min=1) * self._excesses
        asked = torch.minimum(asked, FAR_FROM_ALL * largest.narrow(1, 0, 1))
        return torch.where(size < FEWEST_OF_TAIL, -math.inf, asked).squeeze(1)

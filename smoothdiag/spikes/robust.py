"""Robust: what is usual by the quantiles of the last values, on the device; `SpikeRule` for one signal and for many."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from smoothdiag.spikes.rarity import LastDistances
from smoothdiag.spikes.statistics import Judged, LastValues, lost, taking_part
from smoothdiag.spiking import SpikeRule
from smoothdiag.tails import QUANTILES, RANGES_OF_NORMAL, ROUNDING, trusted


class Robust(LastValues):
    """`SpikeRule` on a device: quantiles of the last values.

    Args:
        rule: The rule.
        multiple: What a spike is clipped to, in medians.
    """

    _alone = False  # whether each signal is judged alone

    def __init__(self, norms: int, losses: int, device: torch.device, rule: SpikeRule, multiple: float) -> None:
        super().__init__(norms, losses, device, rule.window)
        self._rule, self._multiple = rule, multiple
        self._shares = torch.stack([torch.full((), share, **self._options) for share in QUANTILES])
        self._half = torch.full((1,), 0.5, **self._options)
        self._slots = torch.arange(rule.window, device=device)
        self._ratio, self._share = (torch.zeros(self._num, **self._options) for _ in range(2))
        self._ratio.narrow(0, 0, norms).add_(math.log(rule.least_ratio))
        self._share.narrow(0, norms, losses).add_(rule.least_rise)
        self._is_loss = torch.arange(self._num, device=device) >= norms
        trust = trusted(rule.deviations, rule.window, self._num if self._alone else 1)
        self._trust = torch.stack([torch.full((), share, **self._options) for share in trust])
        self._level = torch.zeros(self._num, **self._options)
        self._memory = LastDistances(self._num if self._alone else 1, rule, self._options) if rule.memory else None

    def _kept(self) -> dict[str, Tensor]:
        return {**super()._kept(), "level": self._level, **(self._memory.kept if self._memory else {})}

    def judge(self, values: Tensor, counts: Tensor | None) -> Judged:
        """See `Statistics`."""
        x = self._logs(values)  # the logarithm of 0 is not finite, and so left out
        enters = taking_part(x, counts)
        number = self._counts.clamp(max=self._window).unsqueeze(1)
        quantiles = _quantiles(self._ring, self._shares)
        middle = quantiles.select(1, QUANTILES.index(0.5))
        known = enters & (self._counts >= self._rule.fewest)
        self._level = torch.where(known & self._is_loss, torch.maximum(self._level, middle.abs()), self._level)
        distance = _distance(x, quantiles, ROUNDING * self._level)
        distance = self._with_logs(x, distance, quantiles.select(1, QUANTILES.index(0.1)), number)
        away = distance * self._trust.gather(0, number.squeeze(1))
        away = torch.where(known, away, 0.0)
        rise = x - middle
        fired = known & self._is_far(away, known)
        fired &= rise >= self._ratio + self._share * middle.abs()
        usual = middle.clone()
        usual.narrow(0, 0, self._norms).exp_()
        self._add(x, enters)
        return Judged(fired, usual, distance, usual * self._multiple)

    def _is_far(self, away: Tensor, known: Tensor) -> Tensor:
        kinds = (0, self._norms), (self._norms, self._num - self._norms)
        largest = [away.narrow(0, *kind).amax().clamp(min=0) for kind in kinds if kind[1]]
        total = torch.stack(largest).square().sum().sqrt()
        is_far = total > self._rule.deviations
        if self._memory:
            is_far &= self._memory.are_rare(total.unsqueeze(0), known.any().unsqueeze(0)).squeeze(0)
        return is_far & (away >= self._rule.deviations / 2)

    def _with_logs(self, x: Tensor, distance: Tensor, low: Tensor, number: Tensor) -> Tensor:
        """Returns the distances, or those of positive losses on a logarithmic scale where they are smaller."""
        if self._num == self._norms:
            return distance
        in_logs = _distance(x.log(), _quantiles(self._without_trend(number), self._shares))
        both = self._is_loss & (x > 0) & (low > 0)
        return torch.where(both, torch.minimum(distance, in_logs), distance)

    def _without_trend(self, number: Tensor) -> Tensor:
        """Returns the logarithms of the last values as they would be without a trend, on the level of this step."""
        age = (self._counts.unsqueeze(1) - 1 - self._slots).remainder(self._window)
        values, half = self._ring.masked_fill(self._ring <= 0, math.nan).log(), number // 2
        is_kept = age < number
        newer, older = age < half, (age >= number - half).logical_and_(is_kept)
        new, old = (_quantiles(values.where(part, math.nan), self._half) for part in (newer, older))
        return values.where(is_kept, math.nan) + (new - old) / (number - half) * (age + 1)


def _quantiles(values: Tensor, shares: Tensor) -> Tensor:
    """Returns the quantiles of each row, between two values by a straight line.

    Args:
        values: Values, and NaN elsewhere.
        shares: Which quantiles.

    Returns:
        Tensor: the quantiles, shape (rows, shares); NaN without values.
    """
    ordered = values.sort(dim=1).values  # NaN comes last
    last = (values.isnan().logical_not_().sum(dim=1, keepdim=True) - 1).clamp_(min=0)
    place = last * shares
    below = place.long()
    above = torch.minimum(below + 1, last)
    return torch.lerp(ordered.gather(1, below), ordered.gather(1, above), place - below)


def _distance(value: Tensor, quantiles: Tensor, least: Tensor | None = None) -> Tensor:
    """Returns how far values lie from the medians of their windows, in robust deviations of at least ``least``."""
    q10, q25, q50, q75, q90 = quantiles.unbind(dim=1)
    deviation = torch.maximum((q75 - q25) / RANGES_OF_NORMAL[0], (q90 - q10) / RANGES_OF_NORMAL[1])
    if least is not None:
        deviation = torch.maximum(deviation, least)
    return ((value - q50) / deviation).nan_to_num(0.0, math.inf, -math.inf)


class Alone(Robust):
    """`SpikeRule` for many norms, each of which is judged alone and has to lie further away, see `raised`."""

    _alone = True

    def judge(self, values: Tensor, counts: Tensor | None) -> Judged:
        """See `Statistics`; norms that are not finite are spikes, too."""
        found = super().judge(values, counts)
        return replace(found, fired=found.fired | lost(values))

    def _is_far(self, away: Tensor, known: Tensor) -> Tensor:
        is_far = away > self._rule.deviations
        return is_far & self._memory.are_rare(away.clamp(min=0), known) if self._memory else is_far


class Usual(Robust):
    """What is usual by `SpikeRule`, for rules that judge something else; nothing is a spike."""

    def judge(self, values: Tensor, counts: Tensor | None) -> Judged:
        """See `Statistics`."""
        found = super().judge(values, counts)
        return replace(found, fired=torch.zeros_like(found.fired))

"""Robust: what is usual by the quantiles of the last values, on the device; `SpikeRule` for one signal and for many."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from smoothdiag.spikes.statistics import Judged, LastValues, lost, taking_part
from smoothdiag.spiking import QUANTILES, RANGES_OF_NORMAL, SpikeRule


class Robust(LastValues):
    """`SpikeRule` on a device: quantiles of the last values.

    Args:
        rule: The rule.
        multiple: What a spike is clipped to, in medians.
    """

    def __init__(self, norms: int, losses: int, device: torch.device, rule: SpikeRule, multiple: float) -> None:
        super().__init__(norms, losses, device, rule.window)
        self._rule, self._multiple = rule, multiple
        self._shares = torch.stack([torch.full((), share, **self._options) for share in QUANTILES])
        self._half = torch.full((1,), 0.5, **self._options)
        self._slots = torch.arange(rule.window, device=device)
        self._ratio, self._share = (torch.zeros(self._num, **self._options) for _ in range(2))
        self._ratio.narrow(0, 0, norms).add_(math.log(rule.least_ratio))
        self._share.narrow(0, norms, losses).add_(rule.least_rise)
        self._is_loss = self._share > 0

    def judge(self, values: Tensor, counts: Tensor | None) -> Judged:
        """See `Statistics`."""
        x = self._logs(values)  # the logarithm of 0 is not finite, and so left out
        enters = taking_part(x, counts)
        number = self._counts.clamp(max=self._window).unsqueeze(1)
        quantiles = _quantiles(self._ring, number, self._shares)
        middle = quantiles.select(1, QUANTILES.index(0.5))
        known = enters & (self._counts >= self._rule.fewest)
        distance = _distance(x, quantiles)
        away = torch.where(known, self._with_logs(x, distance, number), 0.0)
        rise = x - middle
        fired = known & self._is_far(away)
        fired &= rise >= self._ratio + self._share * middle.abs()
        usual = middle.clone()
        usual.narrow(0, 0, self._norms).exp_()
        self._add(x, enters)
        return Judged(fired, usual, distance, usual * self._multiple)

    def _is_far(self, away: Tensor) -> Tensor:
        kinds = (0, self._norms), (self._norms, self._num - self._norms)
        largest = [away.narrow(0, *kind).amax().clamp(min=0) for kind in kinds if kind[1]]
        is_far = torch.stack(largest).square().sum().sqrt() > self._rule.deviations
        return is_far & (away >= self._rule.deviations / 2)

    def _with_logs(self, x: Tensor, distance: Tensor, number: Tensor) -> Tensor:
        """Returns the distances, or those on a logarithmic scale where they are smaller and all losses are positive."""
        if self._num == self._norms:
            return distance
        in_logs = _distance(x.log(), _quantiles(self._without_trend(number), number, self._shares))
        both = self._is_loss & (x > 0) & (self._ring.nan_to_num(math.inf).amin(dim=1) > 0)
        return torch.where(both, torch.minimum(distance, in_logs), distance)

    def _without_trend(self, number: Tensor) -> Tensor:
        """Returns the logarithms of the last values as they would be without a trend, on the level of this step."""
        age = (self._counts.unsqueeze(1) - 1 - self._slots).remainder(self._window)
        values, half = self._ring.log(), number // 2
        is_kept = age < number
        newer, older = age < half, (age >= number - half).logical_and_(is_kept)
        new, old = (_quantiles(values.where(part, math.nan), half, self._half) for part in (newer, older))
        return values.where(is_kept, math.nan) + (new - old) / (number - half) * (age + 1)


def _quantiles(values: Tensor, number: Tensor, shares: Tensor) -> Tensor:
    """Returns the quantiles of each row, between two values by a straight line.

    Args:
        values: Values, and NaN elsewhere.
        number: How many values each row has, shape (rows, 1).
        shares: Which quantiles.

    Returns:
        Tensor: the quantiles, shape (rows, shares); NaN without values.
    """
    ordered = values.sort(dim=1).values  # NaN comes last
    last = (number - 1).clamp_(min=0)
    place = last * shares
    below = place.long()
    above = torch.minimum(below + 1, last)
    return torch.lerp(ordered.gather(1, below), ordered.gather(1, above), place - below)


def _distance(value: Tensor, quantiles: Tensor) -> Tensor:
    """Returns how far values lie from the medians of their windows, in robust standard deviations."""
    q10, q25, q50, q75, q90 = quantiles.unbind(dim=1)
    deviation = torch.maximum((q75 - q25) / RANGES_OF_NORMAL[0], (q90 - q10) / RANGES_OF_NORMAL[1])
    return ((value - q50) / deviation).nan_to_num(0.0, math.inf, -math.inf)


DEGREES = 0.63
"""Degrees of freedom of a robust deviation, per value that it is made of: with these, normal values that are compared
with the quantiles of `SpikeRule` have the tail of Student's t; `tests/spikes/test_spike_modules.py` simulates it."""


def raised(deviations: float, number: int, values: int) -> float:
    """Returns the distance at which each of many signals is as rare as one at ``deviations``, divided by their number.

    The deviation of a window is a guess, and now and then it is too small. So large distances are more frequent than a
    normal distribution has them: as frequent as Student's t with nu degrees of freedom, whose tail falls with
    (1 + d^2 / nu)^(-(nu + 1) / 2). By the bound of Bonferroni the signals together then seldom fire by chance, however
    they depend on each other.

    Args:
        deviations: Distance asked of one signal.
        number: Number of signals.
        values: Number of values in the window.
    """
    nu = DEGREES * max(values, 1)
    return math.sqrt(nu * ((1 + deviations**2 / nu) * number ** (2 / (nu + 1)) - 1))


class Alone(Robust):
    """`SpikeRule` for many norms, each of which is judged alone and has to lie further away, see `raised`."""

    def __init__(self, norms: int, losses: int, device: torch.device, rule: SpikeRule, multiple: float) -> None:
        super().__init__(norms, losses, device, rule, multiple)
        asked = [raised(rule.deviations, norms, values) for values in range(rule.window + 1)]
        self._asked = torch.stack([torch.full((), least, **self._options) for least in asked])

    def judge(self, values: Tensor, counts: Tensor | None) -> Judged:
        """See `Statistics`; norms that are not finite are spikes, too."""
        found = super().judge(values, counts)
        return replace(found, fired=found.fired | lost(values))

    def _is_far(self, away: Tensor) -> Tensor:
        return away > self._asked.gather(0, self._counts.clamp(max=self._window))


class Usual(Robust):
    """What is usual by `SpikeRule`, for rules that judge something else; nothing is a spike."""

    def judge(self, values: Tensor, counts: Tensor | None) -> Judged:
        """See `Statistics`."""
        found = super().judge(values, counts)
        return replace(found, fired=torch.zeros_like(found.fired))

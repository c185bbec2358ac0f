"""Statistics: what is usual in a run, kept on the device and compared with each step without waiting for it.

Each class judges some signals of a run, one row each: first those that are norms, then the losses. It keeps tensors on
one device and never reads them. ``judge`` compares the values of a step with the steps before, and then counts them in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smoothdiag.spiking import QUANTILES, RANGES_OF_NORMAL, SpikeRule
from smoothdiag.vectors import widest


@dataclass(frozen=True)
class Judged:
    """The signals of one step, beside what is usual; every tensor has one entry for each signal.

    Attributes:
        fired: Which signals are spikes.
        usual: What is usual, in the unit of the signal; NaN while it is not known.
        deviations: Distance from what is usual, in standard deviations as the rule counts them.
        target: The norm that a spike would be clipped to.
    """

    fired: Tensor
    usual: Tensor
    deviations: Tensor
    target: Tensor


def beside(first: Judged, second: Judged) -> Judged:
    """Returns the signals of two as one."""
    return Judged(**{name: torch.cat([part, getattr(second, name)]) for name, part in vars(first).items()})


def lost(values: Tensor) -> Tensor:
    """Returns which values are not finite; -inf stands for a signal that was not given."""
    return values.isnan() | (values == math.inf)


class Statistics(ABC):
    """What is usual for some signals.

    Args:
        norms: Number of signals that are norms; they come first.
        losses: Number of signals that are losses.
        device: Where the values come from, and where everything is kept.
    """

    def __init__(self, norms: int, losses: int, device: torch.device) -> None:
        self._norms, self._num = norms, norms + losses
        self._options: dict[str, Any] = {"dtype": widest(device), "device": device}
        self._counts = torch.zeros(self._num, dtype=torch.int64, device=device)

    @abstractmethod
    def judge(self, values: Tensor, counts: Tensor | None) -> Judged:
        """Compares the values of a step with those before, and counts them in.

        Args:
            values: One value for each signal.
            counts: A 0-dim bool: whether the step counts at all; ``None`` if it does.
        """

    @abstractmethod
    def _kept(self) -> dict[str, Tensor]:
        """Returns the tensors of the state, by name."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as numbers; waits for the device."""
        return {name: tensor.tolist() for name, tensor in self._kept().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: If it is of another rule, or of other signals.
        """
        mine = self._kept()
        given = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}
        shapes = {name: tuple(value.shape) for name, value in given.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in mine.items()}:
            raise ValueError(
                "Parameter `state` should come from a guard with the same rule and the same signals. Found statistics "
                f"of other shapes: {shapes}."
            )
        for name, tensor in mine.items():
            tensor.copy_(given[name])

    def _logs(self, values: Tensor) -> Tensor:
        """Returns the logarithms of norms, and losses as they are."""
        found = values.clone()
        found.narrow(0, 0, self._norms).log_()
        return found


def _enters(x: Tensor, counts: Tensor | None) -> Tensor:
    """Returns which values take part: finite ones."""
    return x.isfinite() if counts is None else x.isfinite().logical_and_(counts)


class _Recent(Statistics):
    """The last values of each signal.

    Args:
        window: How many.
    """

    def __init__(self, norms: int, losses: int, device: torch.device, window: int) -> None:
        super().__init__(norms, losses, device)
        self._window = window
        self._ring = torch.full((self._num, window), math.nan, **self._options)

    def _kept(self) -> dict[str, Tensor]:
        return {"counts": self._counts, "ring": self._ring}

    def _add(self, x: Tensor, enters: Tensor) -> None:
        place = (self._counts % self._window).unsqueeze(1)
        before = self._ring.gather(1, place)
        self._ring.scatter_(1, place, torch.where(enters.unsqueeze(1), x.unsqueeze(1), before))
        self._counts += enters


class Robust(_Recent):
    """`SpikeRule` on a device: quantiles of the last values.

    Args:
        rule: The rule.
        multiple: What a spike is clipped to, in medians.
    """

    def __init__(self, norms: int, losses: int, device: torch.device, rule: SpikeRule, multiple: float) -> None:
        super().__init__(norms, losses, device, rule.window)
        self._rule, self._multiple = rule, multiple
        self._shares = torch.stack([torch.full((), share, **self._options) for share in QUANTILES])
        self._ratio, self._share = (torch.zeros(self._num, **self._options) for _ in range(2))
        self._ratio.narrow(0, 0, norms).add_(math.log(rule.least_ratio))
        self._share.narrow(0, norms, losses).add_(rule.least_rise)

    def judge(self, values: Tensor, counts: Tensor | None) -> Judged:
        """See `Statistics`."""
        x = self._logs(values)  # the logarithm of 0 is not finite, and so left out
        enters = _enters(x, counts)
        q10, q25, middle, q75, q90 = self._quantiles()
        deviation = torch.maximum((q75 - q25) / RANGES_OF_NORMAL[0], (q90 - q10) / RANGES_OF_NORMAL[1])
        rise = x - middle
        known = enters & (self._counts >= self._rule.fewest)
        away = torch.where(known, rise / deviation, 0.0).nan_to_num(0.0, math.inf, -math.inf)
        fired = known & self._is_far(away)
        fired &= rise >= self._ratio + self._share * middle.abs()
        usual = middle.clone()
        usual.narrow(0, 0, self._norms).exp_()
        self._add(x, enters)
        return Judged(fired, usual, rise / deviation, usual * self._multiple)

    def _is_far(self, away: Tensor) -> Tensor:
        kinds = (0, self._norms), (self._norms, self._num - self._norms)
        largest = [away.narrow(0, *kind).amax().clamp(min=0) for kind in kinds if kind[1]]
        is_far = torch.stack(largest).square().sum().sqrt() > self._rule.deviations
        return is_far & (away >= self._rule.deviations / 2)

    def _quantiles(self) -> tuple[Tensor, ...]:
        """Returns the quantiles of each signal, between two values by a straight line; NaN without values."""
        ordered = self._ring.sort(dim=1).values  # NaN, where nothing is kept yet, comes last
        last = self._counts.clamp(max=self._window).sub_(1).clamp_(min=0).unsqueeze(1)
        place = last * self._shares
        below = place.long()
        above = torch.minimum(below + 1, last)
        return torch.lerp(ordered.gather(1, below), ordered.gather(1, above), place - below).unbind(dim=1)


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


class Moments(_Recent):
    """`SixSigma` on a device: mean and standard deviation of the last values.

    Args:
        sigmas: Least distance from the mean, in standard deviations.
        multiple: What a spike is clipped to, in means.
    """

    def __init__(
        self, norms: int, losses: int, device: torch.device, window: int, sigmas: float, multiple: float
    ) -> None:
        super().__init__(norms, losses, device, window)
        self._sigmas, self._multiple = sigmas, multiple

    def judge(self, values: Tensor, counts: Tensor | None) -> Judged:
        """See `Statistics`."""
        enters, number = _enters(self._logs(values), counts), self._counts.clamp(max=self._window)
        mean = self._ring.nansum(dim=1) / number
        squares = (self._ring - mean.unsqueeze(1)).square().nansum(dim=1)
        away = (values - mean) / (squares / (number - 1).clamp(min=1)).sqrt()
        is_old = self._counts + 1 >= max(20, self._window // 2)
        fired = enters & is_old & (away.abs() > self._sigmas)
        self._add(values, enters)
        return Judged(fired, mean, away, mean * self._multiple)


class Averages(Statistics):
    """`ZClip` on a device: running averages of norms and of their squared distance from it.

    Args:
        alpha: Weight of the past.
        z: Least distance from the average, in standard deviations.
        warm_up: Number of values that the averages start from.
    """

    EPS = 1e-6
    """Added to the standard deviation, as in the authors' code."""

    def __init__(self, norms: int, losses: int, device: torch.device, alpha: float, z: float, warm_up: int) -> None:
        super().__init__(norms, losses, device)
        self._alpha, self._z, self._warm_up = alpha, z, warm_up
        self._first = torch.zeros(self._num, warm_up, **self._options)
        self._mean, self._variance = (torch.full((self._num,), math.nan, **self._options) for _ in range(2))

    def _kept(self) -> dict[str, Tensor]:
        return {"counts": self._counts, "first": self._first, "mean": self._mean, "variance": self._variance}

    def judge(self, values: Tensor, counts: Tensor | None) -> Judged:
        """See `Statistics`; losses are never spikes."""
        enters, is_old = _enters(self._logs(values), counts), self._counts >= self._warm_up
        deviation = self._variance.sqrt()
        away, usual = (values - self._mean) / (deviation + self.EPS), self._mean
        is_norm = torch.arange(self._num, device=values.device) < self._norms
        fired = enters & is_old & is_norm & (away > self._z)
        target = self._mean + self._z * deviation / (away / self._z)
        taken = torch.where(fired, target, values)
        mean = self._alpha * self._mean + (1 - self._alpha) * taken
        variance = self._alpha * self._variance + (1 - self._alpha) * (taken - mean).square()
        place = self._counts.clamp(max=self._warm_up - 1).unsqueeze(1)
        kept = torch.where((enters & ~is_old).unsqueeze(1), values.unsqueeze(1), self._first.gather(1, place))
        self._first.scatter_(1, place, kept)
        self._counts += enters
        is_ready = enters & (self._counts == self._warm_up)
        first = self._first.mean(dim=1), self._first.var(dim=1, unbiased=False)
        goes_on = enters & is_old
        self._mean = torch.where(is_ready, first[0], torch.where(goes_on, mean, self._mean))
        self._variance = torch.where(is_ready, first[1], torch.where(goes_on, variance, self._variance))
        return Judged(fired, usual, away, target)

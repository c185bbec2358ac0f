"""Statistics: what is usual in a run, kept on the device and compared with each step without waiting for it.

Each class judges some signals of a run, one row each: first those that are norms, then the losses. It keeps tensors on
one device and never reads them. ``judge`` compares the values of a step with the steps before, and then counts them in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        fresh = {name: tensor for name, tensor in mine.items() if name not in state}  # of an earlier version
        given = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()} | fresh
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


def taking_part(x: Tensor, counts: Tensor | None) -> Tensor:
    """Returns which values take part: finite ones."""
    return x.isfinite() if counts is None else x.isfinite().logical_and_(counts)


class LastValues(Statistics):
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


class Moments(LastValues):
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
        enters, number = taking_part(self._logs(values), counts), self._counts.clamp(max=self._window)
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
        enters, is_old = taking_part(self._logs(values), counts), self._counts >= self._warm_up
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

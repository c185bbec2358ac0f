"""Rates: the largest learning rate of each group so far, how long its steps are, and a suggestion for a better one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.adapters import Group, members, weight_decay
from smoothdiag.autoclip.calibration import FEWEST, Calibration
from smoothdiag.autoclip.warm_ups import WarmUp
from smoothdiag.memory import retried

Number = float | Tensor
"""A number, or a 0-dim tensor on a device, which nobody should wait for."""

MOST_AT_ONCE, RECENT = 4.0, 2
"""Largest factor by which rates are raised after a measurement, and how many of the last ones have to allow it."""

MOST_DECAY = 0.1
"""Largest share of x that weight decay may take from it in a step at a raised rate, with what momentum makes of it."""

RISEN = 1.001
"""A rate this many times its peak at the last rise has risen again."""


class Peaks:
    """The learning rate that each group counts with: the largest so far, or the one that a warm-up leads to.

    A rate that is a tensor on a GPU is compared there. Whether it rose cannot be known without waiting.

    Attributes:
        values: Rate that each group counts with [x^2/f].
        rate: Present rate, the largest of all groups [x^2/f].
        share: Present rate over that rate, the largest of all groups.
        counted: Peak of each group when a rise was last reported [x^2/f]. So slow rises add up.
        warm_ups: What is known of the schedule of each group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.values: list[Number] = [0.0 for _ in optimizer.param_groups]
        self.rate: Number = 0.0
        self.share: Number = 1.0
        self.counted: list[float] = [0.0 for _ in optimizer.param_groups]
        self.warm_ups = [WarmUp() for _ in optimizer.param_groups]
        self._first = _first_of_each(optimizer)

    def update(self) -> bool:
        """Reads the present rates; returns whether one has risen above its peak since a rise was last reported."""
        rose, self.values, self.counted, self.warm_ups, self.rate, self.share = retried(self._updated)
        self._first = _first_of_each(self._optimizer)
        return rose

    def _updated(self) -> tuple[bool, list[Number], list[float], list[WarmUp], Number, Number]:
        values, counted, warm_ups = list(self.values), list(self.counted), list(self.warm_ups)
        present = _first_of_each(self._optimizer)
        if len(present) < len(values):  # a group was taken out: the others keep their peaks
            known = {first: i for i, first in enumerate(self._first)}
            places = [known.get(first, i) for i, first in enumerate(present)]
            values, counted = [values[i] for i in places], [counted[i] for i in places]
            warm_ups = [warm_ups[i] for i in places]
        missing = len(present) - len(values)
        values += [0.0] * missing
        counted += [0.0] * missing
        warm_ups += [WarmUp()] * missing
        rose = False
        rates: list[Number] = []
        shares: list[Number] = []
        for i, group in enumerate(self._optimizer.param_groups):
            rates.append(rate := plain(group["lr"]))
            if isinstance(rate, Tensor):
                values[i] = highest = rate.clamp(min=values[i])
                shares.append((rate / highest).nan_to_num(1.0))
            else:
                warm_ups[i] = warm_ups[i].after(rate, group)
                values[i] = peak = warm_ups[i].peak(group)
                rose = rose or peak > RISEN * counted[i]
                if not counted[i] / RISEN <= peak <= RISEN * counted[i]:
                    counted[i] = peak
                shares.append(ratio(rate, peak))
        return rose, values, counted, warm_ups, largest(rates), largest(shares)

    @property
    def is_ahead(self) -> bool:
        """Whether a peak counts that the rate has not reached yet."""
        groups = self._optimizer.param_groups
        return any(w.peak(group) > w.highest for w, group in zip(self.warm_ups, groups, strict=False))

    def state_dict(self) -> dict[str, list[Any]]:
        """Returns the peaks as numbers, and what tells the groups apart."""
        warm_ups = [tuple(warm_up) for warm_up in self.warm_ups]
        peaks = [float(peak) for peak in self.values]
        return {"peaks": peaks, "counted": list(self.counted), "warm_ups": warm_ups, "groups": self._names()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``, also if a list holds the same optimizers in another order now."""
        saved, present = list(state["groups"]), self._names()
        places = list(range(len(state["peaks"])))
        if sorted(saved) == sorted(present):
            alike = {name: [i for i in places if saved[i] == name] for name in saved}
            places = [alike[name].pop(0) for name in present]
        self.values, self.counted = [state["peaks"][i] for i in places], [state["counted"][i] for i in places]
        # Runs of earlier versions knew the largest rate so far alone, and go on by it.
        known = [WarmUp(*each) for each in state["warm_ups"]]
        known = known or [WarmUp(highest=float(peak), believed=False) for peak in state["peaks"]]
        self.warm_ups = [known[i] for i in places]

    def _names(self) -> list[str]:
        held = [
            (type(member).__name__, group["params"])
            for member in members(self._optimizer)
            for group in member.param_groups
        ]
        return [f"{kind}: {sum(p.numel() for p in params)} numbers in {len(params)} tensors" for kind, params in held]

    def times(self, reach: Callable[[Group], float]) -> Number:
        """Returns the peak times ``reach`` of its group; NaN if groups differ."""
        pairs = zip(self.values, self._optimizer.param_groups, strict=False)
        return shared([peak * reach(group) for peak, group in pairs])

    def reduction(self, shortening: Callable[[Group], float]) -> Number:
        """Returns the length of steps of uncorrelated gradients now, as a share of steps of equal ones at the peak."""
        return self.share * max(map(shortening, self._optimizer.param_groups))


def plain(value: Number) -> Number:
    """Returns a number as a float, unless that would wait for a device."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach()
    return float(value)


def ratio(value: Number, peak: Number) -> Number:
    """Returns value / peak; 1 if both are zero."""
    if isinstance(value, Tensor) or isinstance(peak, Tensor):
        return torch.as_tensor(value / peak).nan_to_num(1.0)
    return value / peak if peak else 1.0


def smaller(value: Number, other: Number) -> Number:
    """Returns the smaller of two numbers."""
    if isinstance(value, Tensor):
        return value.clamp(max=other)
    return other.clamp(max=value) if isinstance(other, Tensor) else min(value, other)


def largest(values: Sequence[Number]) -> Number:
    """Returns the largest of some numbers."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    if not tensors:
        return max(values)
    # `full` writes the number on the device. Making a tensor of it would copy it there, and wait.
    device = tensors[0].device
    found = [v.to(device) if isinstance(v, Tensor) else torch.full((), v, device=device) for v in values]
    return torch.stack(found).amax()


def shared(values: Sequence[Number]) -> Number:
    """Returns the number that all groups share; NaN if they differ, or if finding out would wait for a device."""
    first = values[0]
    if len(values) == 1 or all(not isinstance(v, Tensor) and v == first for v in values):
        return first
    return math.nan


def share_of_parameters(optimizer: torch.optim.Optimizer, share: float) -> Number:
    """Returns a share of the length of the parameters [x]; infinite if they are all zero, and say nothing."""
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not held:
        return math.inf
    # Sharded parameters need a sum over ranks, which all ranks make together and only once.
    length = vectors.norm(held) if any(map(vectors.is_sharded, held)) else retried(lambda: vectors.norm(held))
    return retried(lambda: plain((share * length).masked_fill(length == 0, math.inf)))


def suggested(
    calibration: Calibration,
    optimizer: torch.optim.Optimizer,
    multiple: float,
    gain: Callable[[Group], float],
    *,
    cautious: bool = False,
) -> float:
    """Returns multiple * median(rate) / gain of the early measurements [x^2/f].

    If ``cautious``, each of the last two has to allow the rate as well: curvature may grow with the rate.
    NaN with too few measurements, or if gains of groups differ.

    Raises:
        ValueError: If ``multiple`` is not positive and finite.
    """
    if not 0 < multiple < math.inf:
        raise ValueError(f"Parameter `multiple` should be positive and finite. Found `multiple = {multiple!r}`.")
    rates = [m.rate for m in calibration.early if not math.isnan(m.rate)]
    if len(rates) < FEWEST:
        return math.nan
    chosen = min(median(rates), *rates[-RECENT:]) if cautious else median(rates)
    return multiple * chosen / float(shared([gain(group) for group in optimizer.param_groups]))


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    """Returns the rate of each group; reading a tensor may wait for the device."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def raise_rates(
    optimizer: torch.optim.Optimizer, lr: float, gain: Callable[[Group], float], most: float = MOST_AT_ONCE
) -> bool:
    """Multiplies all rates so that the largest is ``lr``, if that raises them; returns whether it did.

    They grow at most ``most`` times at once, and no further than weight decay leaves each step nine tenths of x.
    """
    highest = max(float(group["lr"]) for group in optimizer.param_groups)
    if not highest > 0:
        return False
    decays = [float(group["lr"]) * weight_decay(group) * gain(group) for group in optimizer.param_groups]
    factor = min(lr / highest, most, MOST_DECAY / max(decays) if max(decays) > 0 else math.inf)
    if not factor > 1:
        return False
    written: set[int] = set()
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] *= factor
        elif id(group["lr"]) not in written:  # groups may share one tensor
            written.add(id(group["lr"]))
            group["lr"].mul_(factor)
    return True


def _first_of_each(optimizer: torch.optim.Optimizer) -> list[int]:
    """Returns a mark of each group by which it can be found again."""
    return [id(group["params"][0]) if group["params"] else -1 for group in optimizer.param_groups]

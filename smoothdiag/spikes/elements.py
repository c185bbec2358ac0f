"""Elements: how many elements of the gradient are far beyond their second moment in the optimizer; the rule `SPAM`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.adapters import second_moments
from smoothdiag.adapters.wrappers import pending_scale
from smoothdiag.spikes.rules import SPAM
from smoothdiag.spikes.signals import ELEMENTS, LARGEST_ELEMENT
from smoothdiag.spikes.statistics import Judged, Statistics


class Elements:
    """Counts the elements of the gradient that are spikes by `SPAM`.

    Args:
        optimizer: The optimizer, which keeps second moments.
        rule: The rule.

    Raises:
        ValueError: If it keeps none.
    """

    names = (ELEMENTS, LARGEST_ELEMENT)

    def __init__(self, optimizer: torch.optim.Optimizer, rule: SPAM) -> None:
        self._optimizer, self._rule = optimizer, rule
        self._moments = second_moments(optimizer)

    def values(self, step: int, seen: Tensor, shown: Tensor | None) -> Tensor:
        """Returns the number of elements that are spikes, and the largest |g| / sqrt(v)."""
        found = list(self._bounds()) if step >= self._rule.warm_up else []
        if not found:
            return torch.zeros(2, dtype=seen.dtype, device=seen.device)
        numbers, shares = [], []
        for grad, bound, _ in found:
            share = grad.abs() / bound
            numbers.append((share > 1).sum())
            # An element that is not finite and has no bound is no ratio.
            shares.append(share.nan_to_num(0.0, posinf=math.inf).amax().to(seen, non_blocking=True))
        owners = [p for _, _, p in found]
        largest = torch.stack(shares).amax()
        for ranks in dict.fromkeys(ranks for p in owners for ranks in vectors.shard_groups(p)):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks)
        number = vectors.total([(numbers, owners)]).to(seen, non_blocking=True)
        return torch.stack([number, largest * math.sqrt(self._rule.theta)])

    def make(self, device: torch.device) -> Statistics:
        """Returns statistics that take any number but 0 for a spike."""
        return AnyAtAll(len(self.names), 0, device)

    def clip(self, judged: Judged) -> None:
        """Clips these elements to sign(g) sqrt(theta v), if any is a spike."""
        spiked = judged.fired.select(0, 0)
        if spiked.device.type == "cpu" and not spiked:
            return
        for grad, bound, _ in self._bounds():
            bound = bound.masked_fill(~spiked.to(bound.device, non_blocking=True), math.inf)
            grad.clamp_(min=-bound, max=bound)

    def _bounds(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields gradient, largest absolute value of its elements, and parameter."""
        scale = pending_scale(self._optimizer)
        for grad, second, parameter in self._moments:
            if not grad.numel():
                continue
            bound = (vectors.wide(second) * self._rule.theta).sqrt_()
            if scale is not None:
                bound *= scale.to(bound.device, non_blocking=True)
            yield grad, bound.masked_fill_(second == 0, math.inf), parameter


class AnyAtAll(Statistics):
    """Judges a number of which any but 0 is a spike, and the deviation that stands beside it."""

    def _kept(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, which is empty."""

    def judge(self, values: Tensor, counts: Tensor | None) -> Judged:
        """See `Statistics`."""
        number, largest = values.unbind()
        is_spike = number > 0 if counts is None else (number > 0) & counts
        unknown = torch.full_like(number, math.nan)
        return Judged(
            fired=torch.stack([is_spike, torch.zeros_like(is_spike)]),
            usual=torch.stack([torch.zeros_like(number), unknown]),
            deviations=torch.stack([largest, unknown]),
            target=torch.full_like(values, math.inf),
        )

"""Counts: clips that changed a gradient, and steps with a fault."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from smoothdiag.doctor.findings import Fault, Finding, finding
from smoothdiag.doctor.gradients import Owner
from smoothdiag.doctor.sites import Site

FEWEST_CLIPS: Final = 30
"""Clips needed to say never or always. If none of 30 clips binds, at most one in ten would (95%, rule of three)."""


class Binding:
    """How often the clips of one line changed the gradient; the numbers stay on the device until somebody asks.

    Attributes:
        calls: How many clips there were.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._thresholds: set[float] = set()
        self._bound: Any = 0
        self._lowest: Any = None
        self._highest: Any = None

    def add(self, norm: Tensor, threshold: Any) -> None:
        """Adds a clip of a gradient with this norm."""
        first = self._lowest is None
        norm = norm.detach() if first else norm.detach().to(self._lowest.device)
        self.calls += 1
        self._thresholds.add(float(threshold))
        self._bound = self._bound + (norm > float(threshold))
        self._lowest = norm.clone() if first else torch.fmin(self._lowest, norm)
        self._highest = norm.clone() if first else torch.fmax(self._highest, norm)

    @property
    def has_bound(self) -> bool:
        """Whether any clip changed the gradient."""
        return bool(self._bound)

    def finding(self, site: Site) -> Finding | None:
        """Returns a finding if enough clips were seen and all of them, or none, changed the gradient."""
        bound = int(self._bound)
        if self.calls < FEWEST_CLIPS or 0 < bound < self.calls:
            return None
        if not float(self._highest):  # no gradients at all; see Line
            return None
        low, high = min(self._thresholds), max(self._thresholds)
        threshold = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        facts = f"norms from {float(self._lowest):.3g} to {float(self._highest):.3g}, threshold {threshold}"
        fault = Fault.CLIP_ALWAYS_BINDS if bound else Fault.CLIP_NEVER_BINDS
        return finding(fault, site, self.calls, self.calls, unit="clips", facts=facts)


class Count:
    """How many steps had a fault.

    Attributes:
        other: The second line that takes part, or what was seen.
        facts: What was seen, if that stands beside a second line.
        number: How many steps had the fault.
    """

    def __init__(self, other: str, facts: str = "") -> None:
        self.other, self.facts, self.number = other, facts or other, 0
        self._last: dict[Owner | None, int] = {}

    def add(self, owner: Owner | None, step: int) -> None:
        """Counts the step, once."""
        if self._last.get(owner) != step:
            self._last[owner] = step
            self.number += 1

    @property
    def framework(self) -> str:
        """The framework that wraps the optimizer concerned; empty if none does."""
        return next((owner.framework for owner in self._last if owner is not None and owner.framework), "")

    def possible(self, steps: int) -> int:
        """Returns how many steps the optimizers concerned took; ``steps`` counts for faults without an optimizer."""
        return max(self.number, sum(steps if owner is None else owner.steps for owner in self._last))

"""Several optimizers that take one step together: each of them answers for what it moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from smoothdiag.adapters.diagonals import Diagonals
from smoothdiag.adapters.joint import Joint, members, moved_by
from smoothdiag.adapters.protocol import UNKNOWN, Adapter, Ball, Group, Limits, StabilityLimit, Way
from smoothdiag.adapters.unknown import Unknown
from smoothdiag.adapters.updates import Formula


class Several(Unknown):
    """Describes optimizers that take one step together.

    Args:
        optimizer: The optimizers.
        adapters: What is known of each of them, in their order.
    """

    def __init__(self, optimizer: Joint, adapters: Sequence[Adapter]) -> None:
        super().__init__(optimizer)
        self.adapters = tuple(adapters)

    @property
    def way(self) -> Way:  # type: ignore[override]
        """What AutoClip may shorten; "nothing" if that holds for one of them, and "mixed" if they differ otherwise."""
        ways = {adapter.way for adapter in self.adapters}
        return "nothing" if "nothing" in ways else ways.pop() if len(ways) == 1 else "mixed"

    @property
    def follows_gradients(self) -> bool:  # type: ignore[override]
        """Whether all of them do."""
        return all(adapter.follows_gradients for adapter in self.adapters)

    def momentum(self, group: Group) -> float:
        """Returns the momentum of the optimizer that holds the group."""
        return self._of_group(group).momentum(group)

    def gain(self, group: Group) -> float:
        """Returns the gain of the optimizer that holds the group."""
        return self._of_group(group).gain(group)

    def shortening(self, group: Group) -> float:
        """Returns the shortening of the optimizer that holds the group."""
        return self._of_group(group).shortening(group)

    def update(self, group: Group) -> Formula | None:
        """Returns the answer of the optimizer that holds the group."""
        return self._of_group(group).update(group)

    def preconditioner(self, parameters: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Returns the diagonals of all of them, if each of them has one."""
        found: dict[int, Callable[[], Tensor]] = {}
        for adapter, held in self._held(parameters):
            if (diagonal := adapter.preconditioner(held)) is None:
                return None
            found |= {id(p): lambda d=diagonal, i=i: d[i] for i, p in enumerate(held)}  # type: ignore[misc]
        return Diagonals(parameters, lambda p: found[id(p)]())

    def unit_balls(self, parameters: Sequence[Tensor]) -> Sequence[Ball | None]:
        """Returns the ball that each optimizer tells for its parameters."""
        found: dict[int, Ball | None] = {}
        for adapter, held in self._held(parameters):
            if hasattr(type(adapter), "unit_balls"):  # optimizers that answer themselves may leave it out
                found |= zip(map(id, held), adapter.unit_balls(held), strict=True)  # type: ignore[attr-defined]
        return [found.get(id(p)) for p in parameters]

    def stability_limit(self, parameters: Sequence[Tensor]) -> Limits:
        """Returns the limits that all of them share; NaN where they differ."""
        found = [StabilityLimit(*adapter.stability_limit(held)) for adapter, held in self._held(parameters)]
        if len({limit.preconditioned for limit in found}) != 1:
            return UNKNOWN
        curvatures, small = ({getattr(limit, name) for limit in found} for name in ("curvature", "small_batch"))
        curvature, small_batch = (values.pop() if len(values) == 1 else math.nan for values in (curvatures, small))
        return StabilityLimit(curvature, found[0].preconditioned, small_batch)

    def evaluated(self, parameter: Tensor) -> Tensor:
        """Returns the answer of the optimizer that holds the parameter."""
        return next((a.evaluated(parameter) for a, _ in self._held([parameter])), parameter)

    def refusal(self) -> str:
        """Returns the first refusal."""
        return next((refused for adapter in self.adapters if (refused := adapter.refusal())), "")

    def late_refusal(self, moved: float | Tensor) -> str | None:
        """Returns the first refusal; ``None`` if there is none, but one of them cannot tell yet."""
        answers = [adapter.late_refusal(moved) for adapter in self.adapters]
        return next(filter(None, answers), None if None in answers else "")

    def _of_group(self, group: Group) -> Adapter:
        pairs = zip(members(self.optimizer), self.adapters, strict=True)
        return next(a for optimizer, a in pairs if any(group is mine for mine in optimizer.param_groups))

    def _held(self, parameters: Sequence[Tensor]) -> list[tuple[Adapter, list[Tensor]]]:
        """Returns each adapter with those of the parameters that its optimizer holds, if there are any."""
        found = []
        for optimizer, adapter in zip(members(self.optimizer), self.adapters, strict=True):
            mine = set(map(id, moved_by(optimizer)))
            if held := [p for p in parameters if id(p) in mine]:
                found.append((adapter, held))
        return found

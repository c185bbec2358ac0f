"""Block: the part of the Hessian that belongs to one parameter group, plain or in the optimizer's norm."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.measure.estimators.base import PRECONDITIONED, Estimate, Step
from smoothdiag.vectors import Vector


@dataclass(frozen=True)
class Block:
    """H, or P^-1/2 H P^-1/2, restricted to some of the parameters.

    Attributes:
        step: The step that is measured.
        group: Parameter group; "all" for all parameters.
        indices: Indices of its parameters.
        inverse_root: P^-1/2 of these parameters, zero where P is zero; ``None`` for the plain H.
    """

    step: Step
    group: str
    indices: Sequence[int]
    inverse_root: Vector | None = None

    @property
    def suffix(self) -> str:
        """Suffix of the estimator's name."""
        return "" if self.inverse_root is None else PRECONDITIONED

    def times(self, matvec: Callable[[Vector], list[Tensor]], v: Vector) -> list[Tensor]:
        """Returns the product of the block with ``v``, from a product ``matvec`` of the whole Hessian."""
        known = dict(zip(self.indices, self._scaled(v), strict=True))
        product = matvec([known[i] if i in known else torch.zeros_like(x) for i, x in enumerate(self.step.start)])
        return self._scaled([product[i] for i in self.indices])

    def gradient(self) -> list[Tensor]:
        """Returns g or P^-1/2 g at the start of the step."""
        return self._scaled([self.step.at_start.gradient[i] for i in self.indices])

    def update(self) -> list[Tensor]:
        """Returns d or P^1/2 d, for the displacement d = x_{k+1} - x_k."""
        made = vectors.sub(self.step.end, self.step.start)
        chosen = [made[i] for i in self.indices]
        if self.inverse_root is None:
            return chosen
        return [(x / r).where(r != 0, 0.0) for x, r in zip(chosen, self.inverse_root, strict=True)]

    def empty(self, name: str) -> Estimate:
        """Returns an estimate with everything that is known before the measurement."""
        limit = self.step.stability_limit
        applies = limit.preconditioned == (self.inverse_root is not None)
        return Estimate(
            name + self.suffix,
            smoothness=math.nan,
            grad_norm=float(vectors.norm(self.gradient())),
            step_norm=math.nan,
            loss=self.step.at_start.loss,
            group=self.group,
            extra={"stability_limit": limit.curvature if applies else math.nan},
        )

    def _scaled(self, v: Vector) -> list[Tensor]:
        return list(v) if self.inverse_root is None else [x * r for x, r in zip(v, self.inverse_root, strict=True)]


def blocks_of(step: Step, *, by_group: bool) -> list[Block]:
    """Returns the block of all parameters, then the groups, and all of these again in the preconditioner's norm."""
    groups: dict[str, Sequence[int]] = {"all": range(len(step.start)), **(step.groups if by_group else {})}
    blocks = [Block(step, group, indices) for group, indices in groups.items()]
    if step.preconditioner is not None:
        roots = [(1 / p.sqrt()).where(p > 0, 0.0) for p in step.preconditioner]
        blocks += [Block(step, group, indices, [roots[i] for i in indices]) for group, indices in groups.items()]
    return blocks

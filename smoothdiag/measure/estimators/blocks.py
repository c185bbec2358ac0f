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

    P^-1/2 is worked out for one parameter at a time whenever it is needed, and never held as a copy.

    Attributes:
        step: The step that is measured.
        group: Parameter group; "all" for all parameters.
        indices: Indices of its parameters.
        is_scaled: Whether the block is in the preconditioner's norm; the step must have one.
    """

    step: Step
    group: str
    indices: Sequence[int]
    is_scaled: bool = False

    @property
    def suffix(self) -> str:
        """Suffix of the estimator's name."""
        return PRECONDITIONED if self.is_scaled else ""

    def times(self, matvec: Callable[[Vector], list[Tensor]], v: Vector) -> list[Tensor]:
        """Returns the product of the block with ``v``, from a product ``matvec`` of the whole Hessian."""
        parts = dict(zip(self.indices, v, strict=True))
        product = matvec(
            [self._scaled(i, parts[i]) if i in parts else torch.zeros_like(x) for i, x in enumerate(self.step.start)]
        )
        return [self._scaled(i, product[i]) for i in self.indices]

    def gradient(self) -> list[Tensor]:
        """Returns g or P^-1/2 g at the start of the step."""
        gradient = self.step.at_start.gradient
        return [self._scaled(i, gradient[i]) for i in self.indices]

    def update(self) -> list[Tensor]:
        """Returns d or P^1/2 d, for the displacement d = x_{k+1} - x_k."""
        step = self.step
        made = (vectors.sub([step.end[i]], [step.start[i]])[0] for i in self.indices)
        if not self.is_scaled:
            return list(made)
        return [(x / (r := self._inverse_root(i))).where(r != 0, 0.0) for i, x in zip(self.indices, made, strict=True)]

    def empty(self, name: str) -> Estimate:
        """Returns an estimate with everything that is known before the measurement."""
        limit = self.step.stability_limit
        applies = limit.preconditioned == self.is_scaled
        return Estimate(
            name + self.suffix,
            smoothness=math.nan,
            grad_norm=float(vectors.norm(self.gradient())),
            step_norm=math.nan,
            loss=self.step.at_start.loss,
            group=self.group,
            extra={
                "stability_limit": limit.curvature if applies else math.nan,
                "stability_limit_small_batch": limit.small_batch if applies else math.nan,
            },
        )

    def _scaled(self, index: int, x: Tensor) -> Tensor:
        return x * self._inverse_root(index) if self.is_scaled else x

    def _inverse_root(self, index: int) -> Tensor:
        """Returns P^-1/2 of one parameter, zero where P is zero."""
        assert self.step.preconditioner is not None
        p = self.step.preconditioner[index]
        return p.sqrt().reciprocal_().where(p > 0, 0.0)


def blocks_of(step: Step, *, by_group: bool) -> list[Block]:
    """Returns the block of all parameters, then the groups, and all of these again in the preconditioner's norm."""
    groups: dict[str, Sequence[int]] = {"all": range(len(step.start)), **(step.groups if by_group else {})}
    norms = [False] if step.preconditioner is None else [False, True]
    return [Block(step, group, indices, scaled) for scaled in norms for group, indices in groups.items()]

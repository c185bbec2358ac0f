"""Rays: the lines on which secants are measured, and the norm that an estimator measures them in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.geometry import Geometry, check_geometry
from smoothdiag.measure.estimators.base import Step
from smoothdiag.tally import Tally
from smoothdiag.vectors import Vector


@dataclass(frozen=True)
class Ray:
    """The points x + t v on a line from the start x of a step.

    Attributes:
        step: The step.
        source: What v is made of, tensors shaped like the parameters.
        direction: Writes v, made of ``source`` and x entry by entry, into a third tensor.
        end: The point at t = 1, if it is known exactly.
    """

    step: Step
    source: Vector
    direction: Callable[[Tensor, Tensor, Tensor], object]
    end: Vector | None = None

    def point(self, t: float) -> list[Tensor]:
        """Returns x + t v, tensors shaped like the parameters."""
        if t == 1 and self.end is not None:
            return list(self.end)
        return vectors.add_scaled(self.step.start, self.made(), t)

    def made(self) -> list[Tensor]:
        """Returns v, tensors shaped like the parameters."""
        found = []
        for v, x in zip(self.source, self.step.start, strict=True):
            found.append(torch.empty_like(vectors.wide(x)))
            self.direction(vectors.wide(v), vectors.wide(x), found[-1])
        return found

    def go(self, t: float, tally: Tally, k: int, targets: list[Tensor]) -> None:
        """Moves the parameters of a piece to x + t v, and adds the squares of the way."""
        packing, piece = tally.packing, tally.packing.pieces[k]
        end = self.end if t == 1 else None
        weights = self.step.weights(packing, k)

        def move(into: Tensor, x: Tensor, v: Tensor, *weights: Tensor) -> list[Tensor]:
            x, v = vectors.wide(x), vectors.wide(v)
            if end is not None:
                into.copy_(v)
            else:
                place = into if into.dtype == x.dtype else torch.empty_like(x)
                self.direction(v, x, place)
                place.mul_(t).add_(x)
                if place is not into:
                    into.copy_(place)
            way = vectors.wide(into) - x  # a narrow dtype has rounded the point
            return [way, *(way * p.sqrt() for p in weights)]

        x, source = packing.piece(k, self.step.start), packing.piece(k, self.source if end is None else end)
        with piece.writing(targets) as into:
            tally.squares(k, ["way" + suffix for suffix in self.step.suffixes], move, into, x, source, *weights)


def along_update(step: Step) -> Ray:
    """Returns the line from x_k to x_{k+1}, which it reaches at t = 1."""
    return Ray(step, step.end, lambda y, x, out: torch.sub(y, x, out=out), end=step.end)


def along_minimiser(step: Step, geometry: Geometry) -> Ray:
    """Returns the line from x_k along the minimiser of <g, v> over ||v|| <= 1, the steepest descent in a norm."""
    return Ray(step, geometry.lmo(step.at_start.gradient), lambda v, x, out: out.copy_(v))


def along_gradient(step: Step) -> Ray:
    """Returns the line from x_k down the gradient."""
    return Ray(step, step.at_start.gradient, lambda g, x, out: torch.neg(g, out=out))


def geometry_of(geometry: Geometry | Literal["optimizer"], step: Step) -> Geometry:
    """Returns the geometry of an estimator at a step, which the step's optimizer may choose."""
    return step.own if isinstance(geometry, str) else geometry


def check_norm(geometry: object) -> None:
    """Makes sure that a parameter ``geometry`` is a norm, or asks for that of the optimizer.

    Raises:
        ValueError: If it is not.
    """
    if geometry != "optimizer":
        check_geometry(geometry)

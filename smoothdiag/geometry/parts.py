"""Parts: a geometry for each of several parts of a parameter list."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothdiag.geometry.vector import Geometry
from smoothdiag.vectors import Vector


@dataclass(frozen=True)
class Part:
    """Some of the parameters, with a geometry of these alone.

    Attributes:
        name: The name of the part.
        indices: Which tensors of the parameter list.
        geometry: Their geometry.
    """

    name: str
    indices: tuple[int, ...]
    geometry: Geometry

    def of(self, x: Vector) -> list[Tensor]:
        """Returns the tensors of the part."""
        return [x[i] for i in self.indices]

    def norm(self, x: Vector) -> float:
        """Returns the norm of the part of x."""
        return float(self.geometry.norm(self.of(x)))

    def dual_norm(self, g: Vector) -> float:
        """Returns the dual norm of the part of g."""
        return float(self.geometry.dual_norm(self.of(g)))


@dataclass(frozen=True)
class Parts:
    """Geometries of parts of a parameter list; as a geometry of the whole list it is that of the first part.

    Tensors outside the first part have no length then, and minimisers leave them where they are.

    Attributes:
        parts: The parts; they may overlap.
    """

    parts: tuple[Part, ...]

    def norm(self, x: Vector) -> Tensor:
        """Returns the norm of the first part of x."""
        return self.parts[0].geometry.norm(self.parts[0].of(x))

    def dual_norm(self, g: Vector) -> Tensor:
        """Returns the dual norm of the first part of g."""
        return self.parts[0].geometry.dual_norm(self.parts[0].of(g))

    def lmo(self, g: Vector) -> list[Tensor]:
        """Returns a minimiser over the ball of the first part; zero outside of it."""
        first = self.parts[0]
        found: Sequence[Tensor] = first.geometry.lmo(first.of(g))
        minimisers = dict(zip(first.indices, found, strict=True))
        return [minimisers[i] if i in minimisers else torch.zeros_like(t) for i, t in enumerate(g)]

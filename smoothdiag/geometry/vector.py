"""Geometries of whole parameter lists."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from smoothdiag import arguments, vectors
from smoothdiag.vectors import Vector


class Geometry(Protocol):
    """A norm on parameter lists, with what the sources need of it."""

    def norm(self, x: Vector) -> Tensor:
        """Returns ||x||, a 0-dim float64 tensor."""
        ...

    def dual_norm(self, g: Vector) -> Tensor:
        """Returns ||g||_* = max of <g, x> over ||x|| <= 1, a 0-dim float64 tensor."""
        ...

    def lmo(self, g: Vector) -> list[Tensor]:
        """Returns a minimiser of <g, x> over ||x|| <= 1, tensors shaped like ``g``; zero where g = 0."""
        ...


def check_geometry(geometry: object) -> None:
    """Makes sure that a parameter ``geometry`` is a norm on parameter lists.

    Raises:
        ValueError: If it is not.
    """
    requirement = "a Geometry, as Euclidean(), or a Product of those of layers"
    arguments.made("geometry", geometry, ("norm", "dual_norm", "lmo"), requirement)


@dataclass(frozen=True)
class Euclidean:
    """The Euclidean norm of the concatenated parameters; its own dual."""

    def norm(self, x: Vector) -> Tensor:
        """Returns the Euclidean norm ||x||, a 0-dim float64 tensor."""
        return vectors.norm(x)

    def dual_norm(self, g: Vector) -> Tensor:
        """Returns the Euclidean norm ||g||, a 0-dim float64 tensor."""
        return vectors.norm(g)

    def lmo(self, g: Vector) -> list[Tensor]:
        """Returns -g / ||g||, or zeros where g = 0."""
        length = vectors.norm(g)
        scale = (-1.0 / length).where(length > 0, 0.0)
        return [(scale * t).to(t.dtype) for t in g]


@dataclass(frozen=True, repr=False)
class Diagonal:
    """The norm ||x||_P = sqrt(sum P x^2) with a positive diagonal P; its dual is ||g||_{P^-1}.

    Attributes:
        diagonal: P, tensors shaped like the parameters. Where it is zero, so must the gradient be.
    """

    diagonal: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.diagonal, tuple | list) or not all(isinstance(p, Tensor) for p in self.diagonal):
            raise arguments.wrong("diagonal", "a tuple of tensors, one for each parameter", self.diagonal)

    def __repr__(self) -> str:
        return f"Diagonal(<{len(self.diagonal)} tensors>)"

    def norm(self, x: Vector) -> Tensor:
        """Returns ||x||_P, a 0-dim float64 tensor."""
        return vectors.norm([t * p.sqrt() for t, p in zip(x, self.diagonal, strict=True)])

    def dual_norm(self, g: Vector) -> Tensor:
        """Returns ||g||_{P^-1}, a 0-dim float64 tensor; infinite where P is zero and g is not."""
        return vectors.norm(self._whitened(g))

    def lmo(self, g: Vector) -> list[Tensor]:
        """Returns -P^-1 g / ||g||_{P^-1}, or zeros where g = 0."""
        whitened = self._whitened(g)
        length = vectors.norm(whitened)
        scale = (-1.0 / length).where(length > 0, 0.0)
        return [(scale * t).to(t.dtype) for t in self._whitened(whitened)]

    def _whitened(self, g: Vector) -> list[Tensor]:
        pairs = zip(g, self.diagonal, strict=True)
        return [(t / p.sqrt()).where((t != 0) | (p != 0), 0.0) for t, p in pairs]

"""Geometries of whole parameter lists."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from smoothdiag import arguments, vectors
from smoothdiag.vectors import Vector


class Geometry(Protocol):
    """A norm on parameter lists, with its dual norm and its linear minimisation oracle.

    Any class with these three methods will do.

    Examples:
        >>> geometry: sd.Geometry = sd.Diagonal((torch.tensor([4.0, 1.0]),))
        >>> g = [torch.tensor([2.0, 0.0])]
        >>> step = geometry.lmo(g)  # among all steps of norm 1, the one along which a loss with gradient g falls most
        >>> print(float(geometry.norm(step)), float(g[0] @ step[0]), float(geometry.dual_norm(g)))
        1.0 -1.0 1.0
    """

    def norm(self, x: Vector) -> Tensor:
        """Returns ||x||, a 0-dim float64 tensor."""
        ...

    def dual_norm(self, g: Vector) -> Tensor:
        """Returns ||g||_* = max of <g, x> over ||x|| <= 1, a 0-dim float64 tensor."""
        ...

    def lmo(self, g: Vector) -> list[Tensor]:
        """Returns a minimiser of <g, x> over ||x|| <= 1, tensors shaped like ``g``; zero if g = 0."""
        ...


def check_geometry(geometry: object) -> None:
    """Makes sure that a parameter ``geometry`` is a norm on parameter lists.

    Raises:
        ValueError: If it is not.
    """
    requirement = "a Geometry, such as Euclidean(), or a Product of the geometries of the layers"
    arguments.made("geometry", geometry, ("norm", "dual_norm", "lmo"), requirement)


@dataclass(frozen=True)
class Euclidean:
    """The Euclidean norm of all parameters together; it is its own dual.

    Examples:
        >>> g = [torch.tensor([3.0]), torch.tensor([4.0])]
        >>> print(float(sd.Euclidean().norm(g)), sd.Euclidean().lmo(g))
        5.0 [tensor([-0.6000]), tensor([-0.8000])]
    """

    def norm(self, x: Vector) -> Tensor:
        """Returns the Euclidean norm ||x||, a 0-dim float64 tensor."""
        return vectors.norm(x)

    def dual_norm(self, g: Vector) -> Tensor:
        """Returns the Euclidean norm ||g||, a 0-dim float64 tensor."""
        return vectors.norm(g)

    def lmo(self, g: Vector) -> list[Tensor]:
        """Returns -g / ||g||, or zeros if g = 0."""
        length = vectors.norm(g)
        scale = (-1.0 / length).where(length > 0, 0.0)
        return [(scale * t).to(t.dtype) for t in g]


@dataclass(frozen=True, repr=False)
class Diagonal:
    """The norm ||x||_P = sqrt(sum P x^2) with a positive diagonal P; its dual is ||g||_{P^-1}.

    Attributes:
        diagonal: P, tensors shaped like the parameters. Where an entry is zero, the gradient must be zero, too.

    Examples:
        >>> geometry = sd.Diagonal((torch.tensor([4.0, 1.0]),))
        >>> x = [torch.tensor([3.0, 8.0])]
        >>> print(float(geometry.norm(x)))  # sqrt(4 * 9 + 64)
        10.0
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
        """Returns ||g||_{P^-1}, a 0-dim float64 tensor; infinite if g is not zero where P is."""
        return vectors.norm(self._whitened(g))

    def lmo(self, g: Vector) -> list[Tensor]:
        """Returns -P^-1 g / ||g||_{P^-1}, or zeros if g = 0."""
        whitened = self._whitened(g)
        length = vectors.norm(whitened)
        scale = (-1.0 / length).where(length > 0, 0.0)
        return [(scale * t).to(t.dtype) for t in self._whitened(whitened)]

    def _whitened(self, g: Vector) -> list[Tensor]:
        return [whitened(t, p) for t, p in zip(g, self.diagonal, strict=True)]


def whitened(g: Tensor, diagonal: Tensor) -> Tensor:
    """Returns P^-1/2 g; zero where both are zero."""
    return (g / diagonal.sqrt()).where((g != 0) | (diagonal != 0), 0.0)

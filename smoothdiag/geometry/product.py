"""Geometries made of others: one that depends on the shape, and the product over the layers of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothdiag import arguments
from smoothdiag.console import counted
from smoothdiag.geometry.layer import RMS, LayerGeometry
from smoothdiag.geometry.spectral import Convolution, Spectral
from smoothdiag.vectors import Vector

_SPECTRAL, _CONVOLUTION, _RMS = Spectral(), Convolution(), RMS()


@dataclass(frozen=True)
class ByShape(LayerGeometry):
    """Takes the geometry that suits a tensor's number of dimensions.

    Attributes:
        matrix: Geometry for tensors of two dimensions.
        convolution: Geometry for tensors of three and more dimensions.
        vector: Geometry for scalars and tensors of one dimension.
    """

    matrix: LayerGeometry = _SPECTRAL
    convolution: LayerGeometry = _CONVOLUTION
    vector: LayerGeometry = _RMS

    def __post_init__(self) -> None:
        for name in ("matrix", "convolution", "vector"):
            if not isinstance(layer := getattr(self, name), LayerGeometry):
                raise arguments.wrong(name, "a LayerGeometry, such as RMS()", layer)

    def check(self, shape: torch.Size) -> None:
        """Raises a ValueError if the geometry for this number of dimensions refuses the shape."""
        self._of(shape).check(shape)

    def _norm(self, x: Tensor) -> Tensor:
        return self._of(x.shape).norm(x)

    def _dual_norm(self, g: Tensor) -> Tensor:
        return self._of(g.shape).dual_norm(g)

    def _minimize(self, gs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        minimisers, products = list(gs), list(gs)
        for geometry in dict.fromkeys(self._of(g.shape) for g in gs):
            members = [i for i, g in enumerate(gs) if self._of(g.shape) == geometry]
            found = geometry.minimize([gs[i] for i in members])  # All at once, because some geometries work in batches.
            for i, minimiser, product in zip(members, *found, strict=True):
                minimisers[i], products[i] = minimiser, product
        return minimisers, products

    def _of(self, shape: torch.Size) -> LayerGeometry:
        return self.vector if len(shape) < 2 else self.matrix if len(shape) == 2 else self.convolution


@dataclass(frozen=True, repr=False)
class Product:
    """The largest of the layers' norms, each divided by its radius; the dual is a sum over all layers.

    ||x|| = max ||x_l||_l / r_l, ||g||_* = sum r_l ||g_l||_l*, and lmo(g)_l = r_l lmo_l(g_l): the minimiser of a layer
    depends on that layer alone, the dual norm on all.

    Attributes:
        layers: A geometry for each parameter.
        radii: Radius r_l for each parameter. Empty: 1 for all.

    Raises:
        ValueError: If numbers of layers, radii and tensors differ, or a radius is not positive.

    Source: Pethick et al. 2025 (NeurIPS), "Generalized Gradient Norm Clipping & Non-Euclidean (L0,L1)-Smoothness",
    section 3.3 with the max norm. Its dual norm is printed there with 1 / r_l; the factor is r_l.
    """

    layers: tuple[LayerGeometry, ...]
    radii: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        requirement = "LayerGeometries in a tuple, one for each parameter"
        if not isinstance(self.layers, tuple | list):
            raise arguments.wrong("layers", requirement, self.layers)
        for layer in self.layers:
            if not isinstance(layer, LayerGeometry):
                raise arguments.wrong("layers", requirement, layer)
        if not isinstance(self.radii, tuple | list):
            raise arguments.wrong("radii", "a tuple of positive numbers", self.radii)
        for radius in self.radii:
            arguments.number("radii", radius, "positive numbers", lambda v: v > 0)
        if not self.radii:
            object.__setattr__(self, "radii", (1.0,) * len(self.layers))
        if len(self.radii) != len(self.layers):
            raise ValueError(
                f"Parameter `radii` should be {counted(len(self.layers), 'positive number')}. Found `radii = "
                f"{self.radii}`."
            )

    def __repr__(self) -> str:
        kinds = ", ".join(sorted({repr(layer) for layer in self.layers}))
        return f"Product(<{counted(len(self.layers), 'layer')} of {kinds}>)"

    def norm(self, x: Vector) -> Tensor:
        """Returns max ||x_l||_l / r_l, a 0-dim float64 tensor."""
        return self._gather(x, lambda layer, radius, t: layer.norm(t).double() / radius).amax()

    def dual_norm(self, g: Vector) -> Tensor:
        """Returns sum r_l ||g_l||_l*, a 0-dim float64 tensor; it is exact even where ``lmo`` is approximate."""
        return self._gather(g, lambda layer, radius, t: layer.dual_norm(t).double() * radius).sum()

    def lmo(self, g: Vector) -> list[Tensor]:
        """Returns the minimisers r_l lmo_l(g_l)."""
        self._check(g)
        return [layer.lmo(t) * radius for layer, radius, t in zip(self.layers, self.radii, g, strict=True)]

    def _gather(self, a: Vector, value: Callable[[LayerGeometry, float, Tensor], Tensor]) -> Tensor:
        self._check(a)
        found = [value(*each) for each in zip(self.layers, self.radii, a, strict=True)]
        return torch.stack([v.to(found[0].device) for v in found])

    def _check(self, a: Vector) -> None:
        if len(a) != len(self.layers):
            raise ValueError(
                f"Parameter `a` should be {counted(len(self.layers), 'tensor')}, one for each layer. Found `len(a) = "
                f"{len(a)}`."
            )

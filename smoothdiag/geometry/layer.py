"""Geometries of one layer: its weight is one tensor, seen as a map from inputs to outputs.

A weight has the shape (outputs, inputs, ...), as torch stores it. The size of an activation v is its root mean square
||v|| / sqrt(len(v)), so that the norms of weights do not change with the width of a network.

Source: Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls, Cevher 2025 (ICML), "Training Deep Learning Models with
Norm-Constrained LMOs", Tables 2 to 4; the norms behind them: Bernstein and Newhouse 2024, "Old optimizer, new norm".
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor

from smoothdiag import vectors


class LayerGeometry(ABC):
    """A norm on one tensor; a subclass defines `_norm`, `_dual_norm` and `_minimize`.

    Sharded tensors (DTensor) are gathered: every rank gets the whole tensor and makes the same computation. Scalars
    come back as plain 0-dim tensors in float32 or wider. Nothing waits for a device unless a class says so.
    """

    def norm(self, x: Tensor) -> Tensor:
        """Returns ||x||, 0-dim."""
        return self._norm(_checked(self, _whole(x)))

    def dual_norm(self, g: Tensor) -> Tensor:
        """Returns ||g||_* = max of <g, x> over ||x|| <= 1, 0-dim."""
        return self._dual_norm(_checked(self, _whole(g)))

    def lmo(self, g: Tensor) -> Tensor:
        """Returns a minimiser of <g, x> over ||x|| <= 1, with the shape and dtype of ``g``; zero if g = 0."""
        return self.minimize([g])[0][0]

    def minimize(self, gs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns lmo(g) and -<g, lmo(g)> for every tensor; the second is the dual norm wherever lmo is exact."""
        minimisers, products = self._minimize([_checked(self, _whole(g)) for g in gs])
        return [_sharded_like(m.to(g.dtype), g) for m, g in zip(minimisers, gs, strict=True)], products

    def check(self, shape: torch.Size) -> None:
        """Raises a ValueError if tensors of this shape have no such norm."""
        if len(shape) < self._min_dim:
            kind = type(self).__name__
            raise ValueError(f"Parameter `shape` should have {self._min_dim} dimensions for {kind}. Found `{shape}`.")

    _min_dim = 0

    @abstractmethod
    def _norm(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _dual_norm(self, g: Tensor) -> Tensor: ...

    @abstractmethod
    def _minimize(self, gs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]: ...


class _Slices(LayerGeometry):
    """The largest Euclidean norm of a slice, times a factor; the dual norm is the sum over slices, over the factor."""

    def _norm(self, x: Tensor) -> Tensor:
        lengths = _directions(self._slices(x))[1]
        return (lengths.amax() if lengths.numel() else lengths.sum()) * self._factor(x)

    def _dual_norm(self, g: Tensor) -> Tensor:
        return _directions(self._slices(g))[1].sum() / self._factor(g)

    def _minimize(self, gs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        minimisers, products = [], []
        for g in gs:
            directions, lengths = _directions(self._slices(g))
            factor = self._factor(g)
            minimisers.append(self._joined(directions.mul_(-1 / factor), g.shape))
            products.append(lengths.sum() / factor)
        return minimisers, products

    def _slices(self, g: Tensor) -> Tensor:
        """Returns the slices as the rows of a matrix."""
        return g.reshape(g.shape[0], math.prod(g.shape[1:]))

    def _joined(self, slices: Tensor, shape: torch.Size) -> Tensor:
        """Undoes `_slices`."""
        return slices.reshape(shape)

    @abstractmethod
    def _factor(self, g: Tensor) -> float: ...


@dataclass(frozen=True)
class Frobenius(_Slices):
    """The Euclidean norm of one tensor; it is its own dual. Every tensor takes steps of the same length, as in LARS."""

    def _slices(self, g: Tensor) -> Tensor:
        return g.reshape(1, g.numel())

    def _factor(self, g: Tensor) -> float:
        return 1.0


@dataclass(frozen=True)
class RMS(Frobenius):
    """The root mean square of all n entries, for biases and for gains of normalisation layers; lmo(g) = -g / rms(g).

    Its dual norm is sqrt(n) ||g||_2.
    """

    def _factor(self, g: Tensor) -> float:
        return 1 / math.sqrt(max(g.numel(), 1))


@dataclass(frozen=True)
class Row(_Slices):
    """The largest Euclidean norm of a row, times a power of the row's length d; the dual norm is a sum over rows.

    Attributes:
        table: False for a map, where each row makes one output. The norm is max sqrt(d) ||row||: the largest output for
            inputs with a root mean square of 1. True for an embedding table, where the rows are the activations. The
            norm is the largest root mean square of a row, max ||row|| / sqrt(d).
    """

    table: bool = False
    _min_dim = 2

    def _factor(self, g: Tensor) -> float:
        width = math.sqrt(max(math.prod(g.shape[1:]), 1))
        return 1 / width if self.table else width


@dataclass(frozen=True)
class Column(_Slices):
    """The largest root mean square of a column of a matrix; a column is what one input adds to the d_out outputs.

    The norm is max ||column|| / sqrt(d_out), its dual norm sqrt(d_out) sum ||column||.
    """

    _min_dim = 2

    def check(self, shape: torch.Size) -> None:
        """Raises a ValueError unless the shape has two dimensions."""
        super().check(shape)
        if len(shape) > 2:
            raise ValueError(f"Parameter `shape` should have 2 dimensions for Column. Found `{shape}`.")

    def _slices(self, g: Tensor) -> Tensor:
        return g.T

    def _joined(self, slices: Tensor, shape: torch.Size) -> Tensor:
        return slices.T.contiguous()

    def _factor(self, g: Tensor) -> float:
        return 1 / math.sqrt(max(g.shape[0], 1))


@dataclass(frozen=True)
class Sign(LayerGeometry):
    """The largest absolute entry, times a factor c: lmo(g) = -sign(g) / c, and the dual norm is ||g||_1 / c.

    Attributes:
        per_input: False for inputs that are indices or of size 1, as in an embedding: c = 1. True for a map of d_in
            inputs (all dimensions but the first), such as a head: c = d_in.
    """

    per_input: bool = False

    def check(self, shape: torch.Size) -> None:
        """Raises a ValueError if there are no inputs to count."""
        if self.per_input and len(shape) < 2:
            raise ValueError(f"Parameter `shape` should have 2 dimensions for Sign(per_input=True). Found `{shape}`.")

    def _norm(self, x: Tensor) -> Tensor:
        wide = _wide(x).abs()
        return (wide.amax() if wide.numel() else wide.sum()) * self._factor(x)

    def _dual_norm(self, g: Tensor) -> Tensor:
        if g.device.type == "cpu":  # a norm in float32 loses digits there over millions of entries
            return _wide(g).abs().sum() / self._factor(g)
        # This reads the tensor once and makes no copy.
        total: Tensor = torch.linalg.vector_norm(g, 1, dtype=torch.promote_types(g.dtype, torch.float32))
        return total / self._factor(g)

    def _minimize(self, gs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        minimisers = [g.sign().mul_(-1 / self._factor(g)) for g in gs]
        return minimisers, [self._dual_norm(g) for g in gs]

    def _factor(self, g: Tensor) -> float:
        return float(max(math.prod(g.shape[1:]), 1)) if self.per_input else 1.0


def describe(geometry: object) -> str:
    """Returns a geometry as one would write it in code, with the attributes that differ from their defaults."""
    assert is_dataclass(geometry)
    given = [f for f in fields(geometry) if getattr(geometry, f.name) != f.default]
    return f"{type(geometry).__name__}({', '.join(f'{f.name}={getattr(geometry, f.name)!r}' for f in given)})"


def _directions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows of a matrix at length 1 (zeros stay zeros), and their lengths, shape (rows, 1)."""
    rows = _wide(rows)
    if rows.numel() == 0:
        return rows.clone(), rows.new_zeros(rows.shape[0], 1)
    # Divide by the largest entry first: in float32 the square of 1e-30 is zero and the square of 1e30 infinite.
    largest = rows.abs().amax(dim=1, keepdim=True)
    scaled = rows / largest.where(largest > 0, 1.0)
    # vector_norm in float32 on a CPU loses digits over millions of entries; sum does not, because it adds up pairs.
    lengths = scaled.square().sum(dim=1, keepdim=True).sqrt_()
    return scaled.div_(lengths.clamp(min=1.0)), lengths * largest


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _checked(geometry: LayerGeometry, x: Tensor) -> Tensor:
    geometry.check(x.shape)
    return x


def _whole(x: Tensor) -> Tensor:
    whole: Tensor = x.full_tensor() if vectors.is_sharded(x) else x
    return whole.detach()


def _sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """Returns a tensor that every rank holds as a whole, sharded as ``like`` is."""
    if not vectors.is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    # Every rank keeps its part of the whole tensor, so nothing is sent.
    copies = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copies.redistribute(placements=like.placements)

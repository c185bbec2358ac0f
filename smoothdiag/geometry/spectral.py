"""Spectral geometries: the largest gain of a linear map or a convolution, from root mean square to root mean square."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothdiag import arguments
from smoothdiag.geometry.layer import LayerGeometry, _wide

# Jordan et al. 2024, "Muon": the steepest slope at zero with which singular values still end near 1, though not at 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_MAX_BATCH = 2**25
"""Most entries in one batch of products: enough to fill a device; three copies take 200 MB."""
_MAX_BATCH_ON_CPU = 2**22
"""Most entries on a CPU, where larger copies cost 8% more time: from 32 MB on, memory is fetched from the system and
given back every time."""


def newton_schulz(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Returns approximately U V' for matrices U S V', by matrix products alone; zero for a zero matrix.

    After five steps, singular values above 0.002 of the Frobenius norm end between 0.68 and 1.21. Smaller ones end at
    up to 485 times their share of the Frobenius norm. So <G, result> is not the nuclear norm: it is 5 to 23% less for
    most matrices, 30% less for rank one, 7% more for rank eight, and up to 12% more for matrices that are orthogonal
    already. In bfloat16 the rounding of entries counts as small singular values: a matrix of rank one gains further
    singular values of up to 0.5.

    Args:
        matrices: Shape (..., m, n), of any scale.
        steps: Number of iterations, each of three products.
        dtype: The dtype of the products and of the result; None takes the dtype of the matrices.

    Source: Bernstein and Newhouse 2024, "Old optimizer, new norm", with the coefficients of Jordan et al. 2024.
    """
    dtype = matrices.dtype if dtype is None else dtype
    if matrices.numel() == 0:
        return matrices.to(dtype)
    tall = matrices.shape[-2] > matrices.shape[-1]
    scaled = _scaled(matrices)[0]
    x = scaled / torch.linalg.matrix_norm(scaled, keepdim=True).clamp(min=1.0)
    x = (x.mT if tall else x).to(dtype)
    shape, x = x.shape, x.reshape(-1, *x.shape[-2:])
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    factors: Tensor = x.reshape(shape)
    return factors.mT if tall else factors


class _Matrix(LayerGeometry):
    """The largest singular value of the tensor as a matrix, divided by a scale; the dual norm is the scaled sum."""

    exact: bool
    steps: int
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        arguments.flag("exact", self.exact)
        arguments.whole("steps", self.steps, 1)
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise arguments.wrong("dtype", "a floating-point torch.dtype or None", self.dtype)

    def _norm(self, x: Tensor) -> Tensor:
        values, largest = self._singular_values(x)
        return (values.amax() if values.numel() else values.sum()) * largest / self._scale(x.shape)

    def _dual_norm(self, g: Tensor) -> Tensor:
        values, largest = self._singular_values(g)
        return values.sum() * largest * self._scale(g.shape)

    def _minimize(self, gs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        factors, products = self._polar([self._matrix(g) for g in gs])
        scales = [self._scale(g.shape) for g in gs]
        minimisers = [self._tensor(f * -s, g.shape) for f, s, g in zip(factors, scales, gs, strict=True)]
        return minimisers, [p * s for p, s in zip(products, scales, strict=True)]

    def _polar(self, matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns F = U V' and <G, F> for every matrix G, in float32 or wider; equal shapes form batches."""
        batches: dict[tuple[object, ...], list[list[int]]] = {}
        for i, m in enumerate(matrices):
            # A matrix and its transpose are the same problem.
            alike = batches.setdefault((min(m.shape), max(m.shape), m.dtype, m.device), [[]])
            most = min(_MAX_BATCH, _MAX_BATCH_ON_CPU) if m.device.type == "cpu" else _MAX_BATCH
            if (len(alike[-1]) + 1) * m.numel() > most and alike[-1]:
                alike.append([])
            alike[-1].append(i)
        factors, products = list(matrices), list(matrices)
        for indices in (part for alike in batches.values() for part in alike):
            wide = [matrices[i].shape[0] <= matrices[i].shape[1] for i in indices]
            stacked = torch.stack([matrices[i] if w else matrices[i].T for i, w in zip(indices, wide, strict=True)])
            stacked = _wide(stacked)
            found = self._factors(stacked)
            inner = (stacked * found).sum(dim=(-2, -1))
            for i, w, factor, product in zip(indices, wide, found.unbind(), inner.unbind(), strict=True):
                factors[i], products[i] = factor if w else factor.T, product
        return factors, products

    def _factors(self, matrices: Tensor) -> Tensor:
        if self.exact:
            return _polar_factors(matrices)
        return newton_schulz(matrices, self.steps, self._dtype_for(matrices)).to(matrices.dtype)

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        if self.dtype is not None or x.dtype == torch.float64:
            return self.dtype or x.dtype
        # Most CPUs have no matrix units, and there bfloat16 is slower than float32.
        return torch.float32 if x.device.type == "cpu" else torch.bfloat16

    def _singular_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scaled, largest = _scaled(_wide(self._matrix(x)))
        finite = scaled.isfinite().all()
        values = torch.linalg.svdvals(scaled.where(finite, 0.0))
        return values.where(finite, math.nan), largest.squeeze()

    @abstractmethod
    def _scale(self, shape: torch.Size) -> float: ...

    def _matrix(self, x: Tensor) -> Tensor:
        return x

    def _tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.contiguous()


@dataclass(frozen=True)
class Spectral(_Matrix):
    """The largest gain of a matrix, from the root mean square of the inputs to the root mean square of the outputs.

    The norm is sqrt(d_in / d_out) times the largest singular value, lmo(U S V') = -sqrt(d_out / d_in) U V', and the
    dual norm is sqrt(d_out / d_in) times the nuclear norm. ``lmo`` and ``minimize`` are approximate unless ``exact`` is
    set (see `newton_schulz`). ``norm`` and ``dual_norm`` always take a singular value decomposition: they are meant for
    diagnostics and wait for the device.

    Attributes:
        exact: Take a singular value decomposition in ``lmo`` too. It is several times slower and waits for the device.
        steps: Number of Newton-Schulz iterations.
        dtype: The dtype of these iterations. None takes bfloat16, float32 on a CPU, and float64 for float64 weights.
    """

    exact: bool = False
    steps: int = 5
    dtype: torch.dtype | None = None

    def check(self, shape: torch.Size) -> None:
        """Raises a ValueError unless the shape has two dimensions."""
        if len(shape) != 2:
            raise ValueError(
                f"Parameter `shape` should have 2 dimensions for Spectral. Found `{shape}`. "
                "Convolution, RMS and Frobenius take other shapes."
            )

    def _scale(self, shape: torch.Size) -> float:
        return math.sqrt(max(shape[0], 1) / max(shape[1], 1))


@dataclass(frozen=True)
class Convolution(_Matrix):
    """The spectral geometry of a convolution's weight (C_out, C_in, *kernel), flattened to (C_out, C_in k).

    k is the number of positions of the kernel, the product of its sides. The norm is k sqrt(C_in / C_out) times the
    largest singular value, a bound on the gain of the convolution; lmo(U S V') = -sqrt(C_out / C_in) / k U V'. C_in
    counts the channels of one group, as in the weight.

    Attributes:
        exact: As in `Spectral`.
        steps: As in `Spectral`.
        dtype: As in `Spectral`.
        transposed: Whether the weight belongs to a transposed convolution, (C_in, C_out, *kernel).
    """

    exact: bool = False
    steps: int = 5
    dtype: torch.dtype | None = None
    transposed: bool = False
    _min_dim = 3

    def _scale(self, shape: torch.Size) -> float:
        c_in, c_out = shape[:2] if self.transposed else (shape[1], shape[0])
        return math.sqrt(max(c_out, 1) / max(c_in, 1)) / max(math.prod(shape[2:]), 1)

    def _matrix(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.transposed else x
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))

    def _tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        if not self.transposed:
            return matrix.reshape(shape)
        return matrix.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1).contiguous()


def _scaled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the matrices with a largest entry of 1 (zeros stay zeros), and their divisors."""
    if matrices.numel() == 0:
        return matrices, matrices.new_ones(*matrices.shape[:-2], 1, 1)
    # In float32 the square of 1e-30 is zero and the square of 1e30 infinite.
    largest = matrices.abs().amax(dim=(-2, -1), keepdim=True)
    largest = largest.where(largest > 0, 1.0)
    return matrices / largest, largest


def _polar_factors(matrices: Tensor) -> Tensor:
    """Returns U V' of the reduced singular value decompositions, without directions of zero singular values."""
    if matrices.numel() == 0:
        return matrices
    scaled = _scaled(matrices)[0]
    # The decomposition of a matrix that is not finite would raise an error in the middle of a step.
    finite = scaled.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    u, s, vt = torch.linalg.svd(scaled.where(finite, 0.0), full_matrices=False)
    # Directions that come from rounding errors do not belong to the matrix.
    kept = s > s.amax(dim=-1, keepdim=True) * max(scaled.shape[-2:]) * torch.finfo(s.dtype).eps
    factors: Tensor = (u * kept.unsqueeze(-2)) @ vt
    return factors.where(finite, math.nan)

"""Arcs: blocks of the parameters whose scale does not matter, and lines that keep their norm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.vectors import Vector

Kind = Literal["", "rows", "whole"]

ROWS_ORTHOGONAL, WHOLE_ORTHOGONAL = 1e-3, 2e-5
"""Cosine of gradient and weight below which a block counts as scale-invariant. In ResNets in float32, before and after
training, it is at most 6e-5 for rows in front of BatchNorm, whose epsilon breaks the invariance a little, and 1e-5 for
such tensors. Other tensors reach 3e-4 by chance, but among the rows of a tensor one was always above .2."""

SILENT = 1e-5
"""Share of the largest gradient norm of a tensor or row below which a gradient is rounding: its cosine says nothing."""

LOUD_ROWS = 0.5
"""Least share of a tensor's rows that must have a gradient for the tensor to count as scale-invariant by rows."""

AWAY = 0.3
"""Relative distance to the second point. Near x the same blocks would be orthogonal by chance again."""


@dataclass(frozen=True)
class Arcs:
    """The blocks of x whose norm a line keeps.

    If f does not depend on the length of a block w, its gradient and its curvature fall as the block grows, by
    1/||w|| and 1/||w||^2. A straight line makes such blocks longer and shows that fall as if it were a law. An arc
    y = ||w|| (w + t u)/||w + t u|| keeps their length.

    Args:
        kinds: For each tensor of x, whether no block ("") keeps its norm, each output row ("rows") or the tensor.
        start: x.
    """

    kinds: Sequence[Kind]
    start: Vector

    def bend(self, point: Vector) -> list[Tensor]:
        """Returns the point with every block of ``kinds`` scaled back to its norm at x."""
        return [
            x if not kind else (x * _ratio(_norms(like, kind), _norms(x, kind))).to(x.dtype)
            for x, like, kind in zip(point, self.start, self.kinds, strict=True)
        ]

    def __bool__(self) -> bool:
        return any(self.kinds)


def _norms(x: Tensor, kind: Kind) -> Tensor:
    """Returns the norms of the blocks of a tensor, in float64 and shaped so that they multiply it."""
    flat = x.flatten(1) if kind == "rows" else x.reshape(1, -1)
    lengths: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=vectors.widest(x.device))
    return lengths.reshape(-1, *[1] * (x.dim() - 1)) if kind == "rows" else lengths.reshape([1] * x.dim())


def _ratio(wanted: Tensor, present: Tensor) -> Tensor:
    # A block of zeros has no direction, so there is nothing to scale.
    return (wanted / present).where(present > 0, 1.0)


def scale_invariant(start: Vector, evaluate: Callable[[Vector], Vector], first: Vector, *, seed: int) -> list[Kind]:
    """Returns which blocks of x do not change the loss when they are scaled.

    By Euler's identity <g_l, w_l> is the derivative of the loss along the scale of the block w_l. It must vanish at x
    and at a second point, for each output row of a tensor with a gradient, or else for the tensor as a whole. Blocks
    without a gradient say nothing and do not count.

    Args:
        start: x.
        evaluate: Returns the gradient at a point.
        first: The gradient at x.
        seed: Seed of the second point.
    """
    kinds = _orthogonal(start, first)
    if not any(kinds):
        return kinds
    noise, moves = vectors.random_like(start, seed=seed), []
    for z, length, size in zip(noise, vectors.norms(noise).tolist(), vectors.norms(start).tolist(), strict=True):
        # Biases that are still zero must move too: a gain may be scale-invariant only as long as they are.
        moves.append(z * (AWAY * (size / length if size else 1.0)))
    there = vectors.add_scaled(start, moves, 1.0)
    again = _orthogonal(there, evaluate(there))
    return [_common(one, other) for one, other in zip(kinds, again, strict=True)]


def _common(one: Kind, other: Kind) -> Kind:
    """Returns the blocks that are invariant at both points; if every row is, the tensor is too."""
    if not one or not other:
        return ""
    return "rows" if one == other == "rows" else "whole"


def _orthogonal(point: Vector, gradient: Vector) -> list[Kind]:
    loudest = float(vectors.norms(gradient).max())
    return [_kind(w, g.to(w.dtype), SILENT * loudest) for w, g in zip(point, gradient, strict=True)]


def _kind(w: Tensor, g: Tensor, silent: float) -> Kind:
    wide = vectors.widest(w.device)
    w, g = w.to(wide), g.to(wide)
    slope, size = float(g.norm()), float(w.norm())
    if w.numel() < 2 or not slope > silent or not size:
        return ""
    if w.dim() > 1 and w[0].numel() > 1:
        products = (w.flatten(1) * g.flatten(1)).sum(1).abs()
        slopes, sizes = g.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1)
        loud = (slopes > SILENT * slopes.max()) & (sizes > 0)
        is_orthogonal = (products <= ROWS_ORTHOGONAL * slopes * sizes)[loud].all()
        if int(loud.sum()) >= LOUD_ROWS * len(w) and bool(is_orthogonal):
            return "rows"
    return "whole" if abs(float((w * g).sum())) <= WHOLE_ORTHOGONAL * slope * size else ""

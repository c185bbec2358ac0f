"""Hessian-vector products by differences of gradients, which work wherever a model can be trained."""

import math
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.tally import Tally
from smoothdiag.vectors import Vector

FIRST_RADIUS = 1e-2
"""Radius of the first product, relative to ||x|| and per unit of the wanted change of the gradient: 1e-4 in float32,
2e-3 under autocast. The actual change of the gradient then corrects the radius."""

LARGEST_RADIUS = 0.1
"""Largest radius relative to ||x||, however flat the loss."""

TOLERATED = 10.0
"""Factor by which the change of the gradient may miss its target before the product is computed anew."""

MAX_TRIES = 4


class Difference:
    """Products H v from the gradients at two points, with a radius chosen for each direction.

    If the gradient has the relative error u and changes by the share t of its length, rounding adds u / t to the
    relative error of the product. The third derivative adds about t^2, or t if the difference is one-sided. The radius
    aims at the change t for which both errors are equal, u^(1/3) or u^(1/2).

    Args:
        objective: The loss.
        point: Where to differentiate, tensors shaped like the parameters.
        one_sided: Whether to take the difference to the gradient at ``point``, which is evaluated once: half the cost,
            and an order less accurate.
        gradient_error: Relative error u of one gradient.
        gradient: The gradient at ``point``, if it is known already.
        radius: Radius of the first product [x], as ``next_radius`` of a point near by; ``None`` guesses it.

    Attributes:
        radius: Length of the last displacement to either side [x].
        next_radius: Length of the next one, corrected by the change that the last one made.
    """

    def __init__(
        self,
        objective: Objective,
        point: Vector,
        *,
        one_sided: bool,
        gradient_error: float,
        gradient: Vector | None = None,
        radius: float | None = None,
    ) -> None:
        self._objective, self._point, self._one_sided = objective, point, one_sided
        self._target = min(max(gradient_error, 1e-16) ** (1 / 2 if one_sided else 1 / 3), 0.2)
        self._size = float(vectors.norm(point)) or 1.0
        self._gradient = None if gradient is None else list(gradient)
        # Over less than a hundred roundings of the parameters, the displacement no longer points along v.
        self._smallest = min(50 * max(torch.finfo(x.dtype).eps for x in point), LARGEST_RADIUS) * self._size
        first = FIRST_RADIUS * self._target * self._size if radius is None else radius
        self.next_radius = self.radius = min(max(first, self._smallest), LARGEST_RADIUS * self._size)

    def gradient(self) -> list[Tensor]:
        """Returns the gradient at the point, evaluated at most once."""
        if self._gradient is None:
            self._gradient = list(self._objective.evaluate(self._point).gradient)
        return self._gradient

    def __call__(self, v: Vector) -> list[Tensor]:
        """Returns H v."""
        for tries_left in reversed(range(MAX_TRIES)):
            self.radius = self.next_radius
            product, change = self._from(v, self.radius)
            if change is None:
                return product
            # A gradient that turned round completely shows that the radius is too long, but not by how much.
            factor = 1 / 64 if not change <= 0.5 else self._target / max(change, self._target / 100)
            self.next_radius = min(max(self.radius * factor, self._smallest), LARGEST_RADIUS * self._size)
            if 1 / TOLERATED <= factor <= TOLERATED or self.next_radius == self.radius or not tries_left:
                return product
            del product
        raise AssertionError("the last try returns")

    def finer(self, v: Vector) -> list[Tensor]:
        """Returns H v from a quarter of the last displacement."""
        return self._from(v, self.radius / 4)[0]

    def _from(self, v: Vector, radius: float) -> tuple[list[Tensor], float | None]:
        """Returns H v from a displacement along v of a given length, and the relative change of the gradient.

        The change is ``None`` if v has no direction.
        """
        length = vectors.norm(v)
        step = torch.where((length > 0) & length.isfinite(), radius / length, 0.0)
        if self._one_sided:
            change, sums = self._from_one_side(self.gradient(), v, step)
            along, sizes = sums.total("along"), [self._length, math.sqrt(sums.total("gradient"))]
        else:
            change, sums, before = self._from_both_sides(v, step)
            along = before.total("along") - sums.total("along")
            sizes = [math.sqrt(x.total("gradient")) for x in (before, sums)]
        # An evaluation without a point means this one.
        self._objective.place(self._point)
        size, off = float(length), math.sqrt(sums.total("change"))
        if size == 0 or not math.isfinite(size):
            return [0 * x for x in v], None
        # The displacement as made is rounded to the dtype of the parameters.
        effective = along / size**2
        for x in change:
            x /= effective
        relative = 2 * off / sum(sizes) if sum(sizes) else 0.0
        return change, relative if self._one_sided else relative / 2

    @cached_property
    def _length(self) -> float:
        return float(vectors.norm(self.gradient()))

    def _from_one_side(self, here: Vector, v: Vector, step: Tensor) -> tuple[list[Tensor], Tally]:
        """Returns the gradient after a displacement less the gradient ``here``, and the sums of the evaluation."""
        change: list[Any] = [None] * len(here)

        def take(tally: Tally, k: int, found: list[Tensor]) -> None:
            parts = vectors.sub(found, tally.packing.take(k, here))
            tally.packing.put(k, change, parts)
            _measure(tally, k, gradient=found, change=parts)

        tally = self._objective.sweep(partial(self._move, v, step), take)
        return change, tally

    def _from_both_sides(self, v: Vector, step: Tensor) -> tuple[list[Tensor], Tally, Tally]:
        """Returns the difference of the gradients on both sides, and the sums of the evaluations, the second first."""
        change: list[Any] = [None] * len(v)
        arrived = list[int]()

        def keep(tally: Tally, k: int, found: list[Tensor]) -> None:
            tally.packing.put(k, change, found)
            _measure(tally, k, gradient=found)

        def take(tally: Tally, k: int, found: list[Tensor]) -> None:
            arrived.append(k)
            for i, x in zip(tally.packing.pieces[k].indices, found, strict=True):
                change[i] = _less(change[i], x)
            _measure(tally, k, gradient=found, change=tally.packing.take(k, change))

        while True:
            before = self._objective.sweep(partial(self._move, v, step), keep)
            arrived.clear()
            tally = self._objective.sweep(partial(self._move, v, -step), take)
            # A sweep that began anew has taken some gradients away twice.
            if len(arrived) == len(set(arrived)):
                return change, tally, before

    def _move(self, v: Vector, step: Tensor, tally: Tally, k: int, targets: list[Tensor]) -> None:
        """Moves the parameters of a piece by ``step`` times v; sums the products of v with the displacement as made."""
        piece, sums = tally.packing.pieces[k], list[Tensor]()
        x, y = (tally.packing.piece(k, z) for z in (self._point, v))
        with piece.writing(targets) as into:
            step = step.to(into.device)
            for there, a, b in vectors.chunks(into, x, y) if piece.lengths is None else [(into, x, y)]:
                a, b = vectors.wide(a), vectors.wide(b)
                there.copy_((b * step).add_(a))
                made = (vectors.wide(there) - a).mul_(b)
                if piece.lengths is None:
                    sums.append(made.sum(dtype=torch.float64))
                else:
                    sums.append(torch.segment_reduce(made.double(), "sum", lengths=piece.lengths, unsafe=True))
        tally.add("along", k, torch.stack(sums).sum(0).reshape(-1))


def _measure(tally: Tally, k: int, **vectors_of_piece: list[Tensor]) -> None:
    parts = [tally.packing.pieces[k].of(tensors) for tensors in vectors_of_piece.values()]
    tally.squares(k, list(vectors_of_piece), lambda *pieces: [vectors.wide(x) for x in pieces], *parts)


def _less(x: Tensor, y: Tensor) -> Tensor:
    """Returns x - y in float32 or wider, in the memory of ``x`` where that is wide enough."""
    return x.sub_(y) if x.dtype == y.dtype and x.dtype.itemsize >= 4 else vectors.sub([x], [y])[0]

"""Hessian-vector products by differences of gradients, which work wherever a model can be trained."""

import math

import torch
from torch import Tensor

from smoothdiag import vectors
from smoothdiag.measure.loss.objective import Objective
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
            self._gradient = self._objective.evaluate(self._point).gradient
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
        made = self._move(v, step)
        there = self._objective.evaluate().gradient
        if self._one_sided:
            here = self.gradient()
        else:
            made = made - self._move(v, -step)
            here = self._objective.evaluate().gradient
        # An evaluation without a point means this one.
        self._objective.place(self._point)
        norms = [vectors.norm(there), vectors.norm(here)]
        change = _taken_from(there, here)
        del here
        # The one wait beside those for the losses. The displacement as made is rounded to the dtype of the parameters.
        size, along, *sizes, off = torch.stack([length, made.to(length), *norms, vectors.norm(change)]).tolist()
        if size == 0 or not math.isfinite(size):
            return [0 * x for x in v], None
        effective = along / size**2
        for x in change:
            x /= effective
        relative = 2 * off / sum(sizes) if sum(sizes) else 0.0
        return change, relative if self._one_sided else relative / 2

    def _move(self, v: Vector, step: Tensor) -> Tensor:
        """Moves the parameters by ``step`` times v; returns the inner product of v with the displacement as made."""
        self._objective.place()
        products = []
        for parameter, x, y in zip(self._objective.parameters, self._point, v, strict=True):
            parts = [vectors.local(z) for z in (x, y)]
            there = vectors.add_scaled(parts[:1], parts[1:], step.to(parts[0].device))
            vectors.assign_([vectors.local(parameter)], there)
            products.append(vectors.dot(vectors.sub(there, parts[:1]), parts[1:]).to(step.device))
        return vectors.total([(products, v)])


def _taken_from(a: list[Tensor], b: Vector) -> list[Tensor]:
    """Returns a - b in float32 or wider, in the memory of ``a`` where that is wide enough; empties ``a``."""
    found = []
    for y in reversed(b):
        x = a.pop()
        found.append(x.sub_(y) if x.dtype == y.dtype and x.dtype.itemsize >= 4 else vectors.sub([x], [y])[0])
    return found[::-1]

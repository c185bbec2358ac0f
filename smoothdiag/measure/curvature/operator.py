"""Hessian: one way of multiplying by the second derivative of an objective."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from smoothdiag import arguments
from smoothdiag.measure.curvature.difference import Difference
from smoothdiag.measure.curvature.guards import autocast_off, twice_differentiable
from smoothdiag.measure.curvature.reverse import Reverse
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.measure.loss.selftest import rounding
from smoothdiag.vectors import Vector

Rung = Literal["retained", "rebuilt", "central", "one_sided"]

BLOCK = 4
"""Vectors that share a graph: they save three quarters of what a shared graph can save (benchmarks/products.py)."""


class Hessian:
    """The Hessian of an objective at a point, as a linear operator.

    Attributes:
        point: The point, tensors shaped like the parameters.
        backend: How products are made.
        reason: Why this backend was chosen.
        num_hvps: Number of products so far.
    """

    def __init__(self, products: Reverse | Difference, point: Vector, backend: Rung, reason: str) -> None:
        self.point, self.backend, self.reason = point, backend, reason
        self.num_hvps = 0
        self._products: Reverse | Difference | None = products

    @cached_property
    def gradient(self) -> list[Tensor]:
        """Gradient at the point [f/x]."""
        return self._open().gradient()

    def __call__(self, v: Vector) -> list[Tensor]:
        """Returns H v, tensors shaped like the parameters.

        Raises:
            ValueError: If ``v`` has other shapes than the parameters.
            RuntimeError: If the operator is closed.

        Units: [f/x^2] times the units of ``v``.
        """
        products = self._open()
        self._check(v)
        self.num_hvps += 1
        return products(v)

    def each(self, vs: Iterable[Vector], *, block: int = BLOCK) -> Iterator[list[Tensor]]:
        """Returns the products H v, in order, of vectors that do not depend on each other's products.

        Args:
            vs: The vectors, taken as they are needed.
            block: Number b of vectors that share a graph if products build it anew: a product then costs 2 + 1 / b
                gradients instead of 3, and the products are the same to the last bit. Meanwhile b vectors and b
                products are in memory. The other backends have nothing to share and take one vector at a time.

        Raises:
            ValueError: If ``block`` is below 1, or a vector has other shapes than the parameters.
            RuntimeError: If the operator is closed.
        """
        arguments.whole("block", block, 1)
        return self._shared(vs, block) if self.backend == "rebuilt" else map(self, vs)

    def _shared(self, vs: Iterable[Vector], block: int) -> Iterator[list[Tensor]]:
        waiting = iter(vs)
        while taken := list(islice(waiting, block)):
            products = self._open()
            assert isinstance(products, Reverse)
            for v in taken:
                self._check(v)
            self.num_hvps += len(taken)
            found = products.block(taken)
            taken.clear()
            while found:
                yield found.pop(0)

    def _check(self, v: Vector) -> None:
        wanted, found = ([tuple(x.shape) for x in vector] for vector in (self.point, v))
        if found != wanted:
            raise ValueError(f"Parameter `v` should hold tensors of shapes {wanted}. Found {found}.")

    def close(self) -> None:
        """Drops the graph; products are no longer possible."""
        self._products = None

    def _open(self) -> Reverse | Difference:
        if self._products is None:
            raise RuntimeError("The Hessian is closed: multiply inside the `with` block that opened it.")
        return self._products

    @property
    def radius(self) -> float | None:
        """Length of the last displacement to either side [x]; ``None`` if products are exact."""
        return self._products.radius if isinstance(self._products, Difference) else None

    @property
    def next_radius(self) -> float | None:
        """Length of the next displacement [x], to begin with at a point near by; ``None`` if products are exact."""
        return self._products.next_radius if isinstance(self._products, Difference) else None

    def finer(self, v: Vector) -> list[Tensor]:
        """Returns H v from a quarter of the last displacement, to compare with the product from the whole.

        Raises:
            RuntimeError: If products are exact.
        """
        products = self._open()
        if not isinstance(products, Difference):
            raise RuntimeError(f"Products of the backend `{self.backend}` are exact and have no radius.")
        self.num_hvps += 1
        return products.finer(v)


@contextmanager
def opened(
    objective: Objective,
    point: Vector,
    backend: Rung,
    *,
    reason: str = "",
    gradient_error: float | None = None,
    gradient: Vector | None = None,
    radius: float | None = None,
    autocast: bool,
) -> Iterator[Hessian]:
    """Yields the Hessian of the given backend; all guards are active while it is open.

    ``gradient`` is the gradient at the point, if it is known from an evaluation with the same autocast regions, and
    ``radius`` the first radius of differences, if it is known from a point near by.
    """
    with ExitStack() as stack:
        stack.enter_context(objective.isolated())
        stack.enter_context(torch.enable_grad())
        if not autocast:
            stack.enter_context(autocast_off({x.device.type for x in point}))
        # Parameters may be wider inside than they were outside.
        point = [x.to(p.dtype) for x, p in zip(point, objective.parameters, strict=True)]
        products: Reverse | Difference
        if backend in ("retained", "rebuilt"):
            stack.enter_context(twice_differentiable(objective.model))
            products = Reverse(objective, point, retain=backend == "retained" and objective.is_one_function)
        else:
            error = gradient_error if gradient_error is not None else max(rounding(x.dtype) for x in point)
            one_sided = backend == "one_sided"
            products = Difference(
                objective, point, one_sided=one_sided, gradient_error=error, gradient=gradient, radius=radius
            )
        hessian = Hessian(products, point, backend, reason)
        del products
        stack.callback(hessian.close)
        yield hessian

"""Hessian-vector products by differentiating twice in reverse mode, which are exact wherever they work."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from smoothdiag.measure.loss.objective import Objective
from smoothdiag.measure.loss.state import Snapshot
from smoothdiag.vectors import Vector

Parts = Sequence[Tensor | None]

BUILD, PRODUCT = 1, 2
"""Cost of the graph of a gradient, and of a product with it, in gradients (benchmarks/scan_cost.py)."""


class Reverse:
    """Products H v as the gradient of <g, v>, where the gradient g has a graph of its own.

    Use it inside ``objective.isolated()`` and ``twice_differentiable``. With ``retain`` the graph of g is kept: a
    product costs two gradients, the first product at most three more, and the memory of about three gradients.
    Without ``retain`` each product builds the graph of one micro-batch at a time anew, at some three gradients.

    Args:
        objective: The loss.
        point: Where to differentiate, tensors shaped like the parameters.
        retain: Whether to keep the graph.
    """

    def __init__(self, objective: Objective, point: Vector, *, retain: bool) -> None:
        self._objective, self._point, self._retain = objective, point, retain
        self._kept: list[Parts] | None = None
        self._state: Snapshot | None = None

    def gradient(self) -> list[Tensor]:
        """Returns the gradient at the point."""
        return self._sum([None if g is None else g.detach() for g in parts] for parts in self._linearised())

    def __call__(self, v: Vector) -> list[Tensor]:
        """Returns H v."""
        self._objective.num_reverse += PRODUCT
        return self._sum(self._product(parts, v) for parts in self._linearised())

    def _linearised(self) -> Iterable[Parts]:
        """Returns the gradient of each micro-batch with its graph, times the scale of the loss."""
        # A kept graph holds the buffers that the forward pass left, not those that it started from.
        self._objective.place(self._point, self._state)
        if self._kept is not None:
            return self._kept
        self._objective.num_reverse += BUILD
        built = (
            torch.autograd.grad(
                loss * self._objective.loss_scale, self._objective.parameters, create_graph=True, allow_unused=True
            )
            for loss in self._objective.losses()
        )
        if not self._retain:
            return built
        self._kept, self._state = list(built), self._objective.state()
        return self._kept

    def _product(self, parts: Parts, v: Vector) -> Parts:
        # A gradient without a graph is constant, and the gradient of an unused parameter is zero: no derivatives.
        known = [(g, x.to(g.dtype)) for g, x in zip(parts, v, strict=True) if g is not None and g.requires_grad]
        if not known:
            return [None] * len(parts)
        return torch.autograd.grad(
            [g for g, _ in known],
            self._objective.parameters,
            [x for _, x in known],
            retain_graph=self._retain,
            allow_unused=True,
        )

    def _sum(self, shares: Iterable[Parts]) -> list[Tensor]:
        total: list[Tensor | None] = [None] * len(self._point)
        for parts in shares:
            dense = [x.to_dense() if x is not None and x.is_sparse else x for x in parts]
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, dense, strict=True)]
        scale = self._objective.loss_scale
        found = []
        for p in reversed(self._point):  # the sums go as the results come
            x = total.pop()
            found.append(torch.zeros_like(p) if x is None else x / scale)
        found.reverse()
        # Sharded models are not differentiated twice, so ranks that share this work are replicas.
        return self._objective.replicas.average(0.0, found)[1] if self._objective.replicas else found

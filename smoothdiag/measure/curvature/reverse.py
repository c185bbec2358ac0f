"""Hessian-vector products by differentiating twice in reverse mode, which are exact wherever they work."""

from collections.abc import Iterable, Iterator, Sequence

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
    Without ``retain`` each call builds the graph of one micro-batch at a time anew: at some three gradients for a
    single product, and nearer two for each of a block that shares the graph.

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
        return self._sums([[None if g is None else g.detach() for g in parts]] for parts in self._linearised())[0]

    def __call__(self, v: Vector) -> list[Tensor]:
        """Returns H v."""
        return self.block([v])[0]

    def block(self, vs: Sequence[Vector]) -> list[list[Tensor]]:
        """Returns H v of each vector; the graph of a micro-batch serves all of them before it is dropped."""
        self._objective.num_reverse += PRODUCT * len(vs)
        return self._sums(self._products(parts, vs) for parts in self._linearised())

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

    def _products(self, parts: Parts, vs: Sequence[Vector]) -> Iterator[Parts]:
        for i, v in enumerate(vs):
            yield self._product(parts, v, keep=self._retain or i + 1 < len(vs))

    def _product(self, parts: Parts, v: Vector, *, keep: bool) -> Parts:
        # A gradient without a graph is constant, and the gradient of an unused parameter is zero: no derivatives.
        known = [(g, x.to(g.dtype)) for g, x in zip(parts, v, strict=True) if g is not None and g.requires_grad]
        if not known:
            return [None] * len(parts)
        return torch.autograd.grad(
            [g for g, _ in known],
            self._objective.parameters,
            [x for _, x in known],
            retain_graph=keep,
            allow_unused=True,
        )

    def _sums(self, shares: Iterable[Iterable[Parts]]) -> list[list[Tensor]]:
        """Returns the sums over micro-batches of what each of them yields in turn."""
        totals: list[list[Tensor | None]] = []
        for share in shares:
            for i, parts in enumerate(share):
                dense = [x.to_dense() if x is not None and x.is_sparse else x for x in parts]
                if i == len(totals):
                    totals.append(dense)
                else:
                    both = zip(totals[i], dense, strict=True)
                    totals[i] = [b if a is None else a if b is None else a + b for a, b in both]
        return [self._finished(total) for total in totals]

    def _finished(self, total: list[Tensor | None]) -> list[Tensor]:
        scale = self._objective.loss_scale
        found = []
        for p in reversed(self._point):  # the sums go as the results come
            x = total.pop()
            found.append(torch.zeros_like(p) if x is None else x / scale)
        found.reverse()
        # Sharded models are not differentiated twice, so ranks that share this work are replicas.
        return self._objective.replicas.average(0.0, found)[1] if self._objective.replicas else found

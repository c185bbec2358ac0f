"""Costs: the gradients that a scan may use, what it has used, and how products with the Hessian are made."""

from dataclasses import replace

from torch import Tensor

from smoothdiag import vectors
from smoothdiag.measure.curvature import Choice, hvp
from smoothdiag.measure.curvature.reverse import BUILD, PRODUCT
from smoothdiag.measure.loss.objective import Evaluation, Objective
from smoothdiag.vectors import Vector

AGREEMENT = 0.05
"""Relative distance up to which a one-sided product at x counts as good enough for the whole scan."""


class Exhausted(Exception):
    """The gradients of the scan are used up."""


class Budget:
    """Counts the gradients of a scan. A product by differentiating twice counts as two gradients, its graph as one.

    Args:
        objective: The loss, which counts evaluations.
        budget: Most gradients.

    Attributes:
        last: The point evaluated last, with loss and gradient there.
    """

    def __init__(self, objective: Objective, budget: int) -> None:
        self._objective, self._budget = objective, budget
        self._booked = self._begin = objective.num_grads + objective.num_reverse
        self.last: tuple[list[Tensor], Evaluation] | None = None

    @property
    def spent(self) -> int:
        """Gradients used so far."""
        return self._objective.num_grads + self._objective.num_reverse - self._begin

    @property
    def left(self) -> int:
        """Gradients left."""
        return self._budget - self.spent

    def book(self) -> int:
        """Returns the gradients used since the last call, so that the rows add up to ``spent``."""
        before, self._booked = self._booked, self._begin + self.spent
        return self._booked - before

    def evaluate(self, point: Vector) -> Evaluation:
        """Returns loss and gradient at a point.

        Raises:
            Exhausted: If no gradient is left.
        """
        if self.left < 1:
            raise Exhausted
        found = self._objective.evaluate(point)
        self.last = list(point), found
        return found


def products_within(gradients: int, choice: Choice) -> int:
    """Returns how many products a number of gradients pays for, besides what every measurement of ||H|| takes."""
    each = {"one_sided": 1, "central": 2, "retained": PRODUCT, "rebuilt": PRODUCT + BUILD}[choice.backend]
    # Differences are compared over two radii at the end; a kept graph is built once.
    once = {"retained": BUILD, "rebuilt": 0}.get(choice.backend, 2 * each)
    return (gradients - once) // each


def cheapest(objective: Objective, point: Vector, gradient: Vector, v: Vector, exact: Choice) -> Choice:
    """Returns one-sided products if they agree at x with those of ``exact``, at a third of the cost; else ``exact``.

    Args:
        objective: The loss.
        point: x.
        gradient: The gradient at x.
        v: The eigenvector of ||H|| at x, in which an error of the product matters.
        exact: How products are made at x.
    """
    one_sided = replace(exact, backend="one_sided")
    with hvp(objective, point, backend=exact) as hessian:
        wanted = hessian(v)
    with hvp(objective, point, backend=one_sided, gradient=gradient) as hessian:
        off = [float(vectors.norm(vectors.sub(wanted, found))) for found in (hessian(v), hessian.finer(v))]
    size = float(vectors.norm(wanted))
    if not exact.symmetric or not max(off) <= AGREEMENT * size:
        return exact
    return replace(one_sided, reason=f"within {max(off) / size if size else 0:.0e} of {exact.backend} at the start")

"""Which way of multiplying by the Hessian to take: tried once, and checked against what must hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smoothdiag import vectors
from smoothdiag.measure.curvature.guards import twice_differentiable
from smoothdiag.measure.curvature.operator import Hessian, Rung, opened
from smoothdiag.measure.curvature.precise import Precise
from smoothdiag.measure.loss.faults import NotPutBack
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.measure.loss.selftest import rounding, self_test
from smoothdiag.vectors import Vector

AGREEMENT = 0.02
"""Relative distance up to which a product counts as equal to a difference of gradients."""

BLOCK_AGREEMENT, SMALLEST_BLOCK = 0.1, 1e-3
"""The same for the part of a single tensor, unless that part is below this share of the whole."""

SURELY_ASYMMETRIC = 1e-2
"""Asymmetry that rounding never explains (ReLU network fitted to a loss of 1e-5, in float32: 1e-3)."""

LEAST_SHARE = 0.4
"""Least share of the curvature that differences show along the gradient (ResNet-20 with ReLU: 0.7 to 1)."""

ASYMMETRIC = 0.05
"""Asymmetry of differences of gradients above which they are not differences of a gradient."""

DOUBTS = 2.0
"""Distance between differences at two radii, times this, is how far off a product may be: at kinks they differ."""


@dataclass(frozen=True)
class Choice:
    """A way of multiplying by the Hessian, and why it is taken.

    Attributes:
        backend: The way.
        reason: Why, with the figures of the check.
        gradient_error: Relative error of one gradient, which the radius of differences depends on; ``None`` takes
            what is usual for the dtype of the parameters.
        symmetric: Whether differences of gradients are, as those of a gradient must be; not tried where products in
            reverse are.
    """

    backend: Rung
    reason: str
    gradient_error: float | None
    symmetric: bool = True


def choose(objective: Objective, point: Vector, *, autocast: bool) -> Choice:
    """Returns the first way that runs and gives what a Hessian gives: symmetric, and the slope of the gradient.

    Differentiating twice is exact, but not every operation can be: some raise an error, and some silently leave
    terms out. Costs 15 to 40 gradients, and some eight in float64 where kinks or a vanishing gradient make
    differences in float32 useless, or where differences are what is left.

    Args:
        objective: The loss.
        point: Where to try.
        autocast: Whether autocast regions of the loss stay in force.
    """
    with opened(objective, point, "central", autocast=autocast) as hessian:
        test, start = self_test(objective, point, None)
        error = test.gradient_error
        if any(map(vectors.is_sharded, point)):
            return Choice("central", "sharded parameters can be differentiated only once", error)
        v = vectors.mixed(start.gradient, seed=0)
    failure = ""
    ways: Sequence[Rung] = ("retained", "rebuilt") if objective.num_micro_batches == 1 else ("rebuilt",)
    for way in ways:
        objective.replicas.meet()
        try:
            with objective.replicas.in_step(), opened(objective, point, way, autocast=autocast) as hessian:
                product, asymmetry = _try(hessian, v)
        except NotPutBack:
            raise
        except Exception as problem:  # whatever a model's own operations raise
            if isinstance(problem, torch.OutOfMemoryError) and not objective.replicas:
                failure = f"{way}: out of memory"
                continue
            failure = f"{way}: {str(problem).strip().splitlines()[0] if str(problem) else type(problem).__name__}"
            break
        tolerated = max(1e-4, 10 * error)
        is_symmetric = asymmetry <= tolerated
        failure = f"{way}: not symmetric, {asymmetry:.1e} where rounding explains {tolerated:.0e}"
        if not asymmetry <= SURELY_ASYMMETRIC:
            break
        with opened(objective, point, "central", gradient_error=error, autocast=autocast) as difference:
            agrees, finding, doubt = _compare(difference, v, product, error)
        if doubt > AGREEMENT and not autocast:
            # Kinks, or a gradient that is nearly zero: float32 cannot tell what a product should be.
            is_precise, is_exact, found = _in_double(objective, point, v, product)
            if is_precise:
                agrees, finding, is_symmetric = is_exact, found, is_symmetric or is_exact
        if is_symmetric and agrees:
            return Choice(way, f"symmetric to {asymmetry:.0e}; {finding}", error)
        failure = f"{way}: {finding}" if is_symmetric else failure
        break
    with opened(objective, point, "central", gradient_error=error, autocast=autocast) as difference:
        product, asymmetry = _try(difference, v)
        spread = float(vectors.norm(vectors.sub(difference(v), difference.finer(v))))
    # Only where two radii agree: at kinks differences are not symmetric either.
    symmetric = asymmetry <= ASYMMETRIC or spread > AGREEMENT * float(vectors.norm(product))
    if not symmetric:
        failure += f"; differences of gradients are not symmetric either, {asymmetry:.0%}: no gradient of one function"
    return Choice("central", failure, error, symmetric)


def asked_for(objective: Objective, point: Vector, way: Rung, *, autocast: bool) -> Choice:
    """Returns a way that is not checked; under autocast the error of a gradient and the scale of the loss are found."""
    error = None
    if autocast:
        with opened(objective, point, way, autocast=True):
            error = self_test(objective, point, None)[0].gradient_error
    return Choice(way, "as asked for", error)


def _try(hessian: Hessian, v: Vector) -> tuple[list[torch.Tensor], float]:
    """Returns H v, and |u'Hv - v'Hu| relative to the lengths of u and Hv, for a u in which both show."""
    product = hessian(v)
    size = float(vectors.norm(product))
    if size == 0 or not math.isfinite(size):
        return product, 0.0
    u = vectors.mixed(product, seed=1)
    there, back = float(vectors.dot(u, product)), float(vectors.dot(v, hessian(u)))
    return product, abs(there - back) / (size * float(vectors.norm(u)))


def _in_double(objective: Objective, point: Vector, v: Vector, product: Vector) -> tuple[bool, bool, str]:
    """Returns whether differences in float64 are sharp, whether a product agrees with them, and by how much."""
    if objective.distributed or all(x.dtype == torch.float64 for x in point):
        return False, False, ""  # buckets for gradients stay in their dtype
    precise = Precise(objective)
    before = precise.num_grads
    try:
        # What is compiled is compiled for one dtype.
        with twice_differentiable(objective.model), opened(precise, point, "central", autocast=False) as difference:
            agrees, finding, doubt = _compare(difference, [x.double() for x in v], product, rounding(torch.float64))
    except NotPutBack:
        raise
    except Exception:  # whatever a model's own operations raise
        return False, False, ""
    finally:
        objective.num_grads += precise.num_grads - before
    return doubt <= AGREEMENT, agrees, f"{finding} in float64"


def _compare(difference: Hessian, v: Vector, product: Vector, error: float) -> tuple[bool, str, float]:
    """Compares a product with differences of gradients.

    Returns whether they agree, as well as differences at two radii agree with each other; the finding in words; and
    the relative distance between differences at two radii.
    """
    coarse = difference(v)
    fine = difference.finer(v)
    assert difference.radius is not None
    length = float(vectors.norm(v))
    # What rounding makes of a difference of gradients over a quarter of the radius.
    noise = 4 * error * float(vectors.norm(difference.gradient)) / difference.radius * length
    wanted, spread = vectors.norms(coarse), vectors.norms(vectors.sub(coarse, fine))
    missed = vectors.norms(vectors.sub(coarse, product))
    whole, off, doubt = (float(x.square().sum().sqrt()) for x in (wanted, missed, spread))
    if not all(map(math.isfinite, (whole, off, doubt))):
        return True, "differences of gradients are not finite", 0.0
    relative, known = (off / whole, doubt / whole) if whole else (0.0, 0.0)
    finding = f"{relative:.0e} from a difference of gradients, which is known to {known:.0e}"
    if off > max(AGREEMENT * whole, DOUBTS * doubt, noise):
        return False, finding, known
    # Kinks are no excuse for missing most of the curvature along v: they add to it less than what is there.
    along, found = float(vectors.dot(v, coarse)), float(vectors.dot(v, product))
    if along > noise * length and found < LEAST_SHARE * along:
        return False, f"{finding}; {found / along:.0%} of the curvature along the gradient", known
    allowed = torch.maximum(BLOCK_AGREEMENT * wanted, DOUBTS * spread).clamp(min=max(SMALLEST_BLOCK * whole, noise))
    worst = int((missed / allowed).argmax()) if whole else 0
    if missed[worst] > allowed[worst]:
        share = float(missed[worst] / wanted[worst])
        return False, f"{finding}; tensor {worst} is {share:.0%} off", known
    return True, finding, known

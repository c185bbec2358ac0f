"""Chooses the backend for products with the Hessian: tries each, and checks properties that every Hessian has."""

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
"""The same for a single tensor of the product, unless its length is below this share of the whole."""

SURELY_ASYMMETRIC = 1e-2
"""Asymmetry that rounding never explains (ReLU network fitted to a loss of 1e-5, in float32: 1e-3)."""

LEAST_SHARE = 0.4
"""Least share that a product must hold of the curvature that differences show along the gradient (ResNet-20 with ReLU:
0.7 to 1)."""

ASYMMETRIC = 0.05
"""Asymmetry of differences of gradients above which there is no function that has these gradients."""

DOUBTS = 2.0
"""A product may be off by this times the distance between differences at two radii, because they differ at kinks."""


@dataclass(frozen=True)
class Choice:
    """A backend for products with the Hessian, and why it was chosen.

    Attributes:
        backend: The backend.
        reason: Why it was chosen, with the figures of the check.
        gradient_error: Relative error of one gradient, which sets the radius of differences; ``None`` takes the usual
            error for the dtype of the parameters.
        symmetric: Whether differences of gradients are symmetric, as they must be for the gradient of one function; not
            tested if products in reverse are symmetric.
    """

    backend: Rung
    reason: str
    gradient_error: float | None
    symmetric: bool = True


def choose(objective: Objective, point: Vector, *, autocast: bool) -> Choice:
    """Returns the first backend that runs and passes the check: symmetric products that are the slope of the gradient.

    Differentiating twice is exact, but not every operation allows it: some raise an error, and some silently leave
    terms out. The check costs 15 to 40 gradients. It costs some eight more in float64 if kinks or a vanishing gradient
    make differences in float32 useless.

    Args:
        objective: The loss.
        point: Where to try.
        autocast: Whether autocast regions of the loss stay active.
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
        except Exception as problem:  # a model's own operations may raise any error
            if isinstance(problem, torch.OutOfMemoryError) and not objective.replicas:
                failure = f"{way}: out of memory"
                continue
            failure = f"{way}: {str(problem).strip().splitlines()[0] if str(problem) else type(problem).__name__}"
            break
        tolerated = max(1e-4, 10 * error)
        is_symmetric = asymmetry <= tolerated
        failure = f"{way}: products are not symmetric, by {asymmetry:.1e}; rounding explains {tolerated:.0e}"
        if not asymmetry <= SURELY_ASYMMETRIC:
            break
        with opened(objective, point, "central", gradient_error=error, autocast=autocast) as difference:
            agrees, finding, doubt = _compare(difference, v, product, error)
        if doubt > AGREEMENT and not autocast:
            # At kinks, or where the gradient is nearly zero, float32 cannot tell what a product should be.
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
    # This is judged only if two radii agree, because at kinks differences are never symmetric.
    symmetric = asymmetry <= ASYMMETRIC or spread > AGREEMENT * float(vectors.norm(product))
    if not symmetric:
        failure += (
            f"; differences of gradients are not symmetric either, by {asymmetry:.0%}: this is "
            "not the gradient of one function, and there is no Hessian"
        )
    return Choice("central", failure, error, symmetric)


def asked_for(objective: Objective, point: Vector, way: Rung, *, autocast: bool) -> Choice:
    """Returns a backend without a check; under autocast it finds the error of a gradient and the scale of the loss."""
    error = None
    if autocast:
        with opened(objective, point, way, autocast=True):
            error = self_test(objective, point, None)[0].gradient_error
    return Choice(way, "as set by `backend`", error)


def _try(hessian: Hessian, v: Vector) -> tuple[list[torch.Tensor], float]:
    """Returns H v, and |u'Hv - v'Hu| relative to the lengths of u and Hv, for a u that both products reach."""
    product = hessian(v)
    size = float(vectors.norm(product))
    if size == 0 or not math.isfinite(size):
        return product, 0.0
    u = vectors.mixed(product, seed=1)
    there, back = float(vectors.dot(u, product)), float(vectors.dot(v, hessian(u)))
    return product, abs(there - back) / (size * float(vectors.norm(u)))


def _in_double(objective: Objective, point: Vector, v: Vector, product: Vector) -> tuple[bool, bool, str]:
    """Returns whether differences in float64 are accurate, whether a product agrees with them, and by how much."""
    if objective.distributed or all(x.dtype == torch.float64 for x in point):
        return False, False, ""  # buckets for gradients keep their dtype
    precise = Precise(objective)
    before = precise.num_grads
    try:
        # Compiled code is compiled for one dtype.
        with twice_differentiable(objective.model), opened(precise, point, "central", autocast=False) as difference:
            agrees, finding, doubt = _compare(difference, [x.double() for x in v], product, rounding(torch.float64))
    except NotPutBack:
        raise
    except Exception:  # a model's own operations may raise any error
        return False, False, ""
    finally:
        objective.num_grads += precise.num_grads - before
    return doubt <= AGREEMENT, agrees, f"{finding}, in float64"


def _compare(difference: Hessian, v: Vector, product: Vector, error: float) -> tuple[bool, str, float]:
    """Compares a product with differences of gradients.

    Returns whether they agree as well as differences at two radii agree with each other, the finding in words, and the
    relative distance between differences at two radii.
    """
    coarse = difference(v)
    fine = difference.finer(v)
    assert difference.radius is not None
    length = float(vectors.norm(v))
    # The error that rounding causes in a difference of gradients over a quarter of the radius.
    noise = 4 * error * float(vectors.norm(difference.gradient)) / difference.radius * length
    wanted, spread = vectors.norms(coarse), vectors.norms(vectors.sub(coarse, fine))
    missed = vectors.norms(vectors.sub(coarse, product))
    whole, off, doubt = (float(x.square().sum().sqrt()) for x in (wanted, missed, spread))
    if not all(map(math.isfinite, (whole, off, doubt))):
        return True, "differences of gradients are not finite", 0.0
    relative, known = (off / whole, doubt / whole) if whole else (0.0, 0.0)
    finding = f"relative distance {relative:.0e} from a difference of gradients, which is accurate to {known:.0e}"
    if off > max(AGREEMENT * whole, DOUBTS * doubt, noise):
        return False, finding, known
    # Kinks do not excuse a product that misses most of the curvature along v: they add less than that.
    along, found = float(vectors.dot(v, coarse)), float(vectors.dot(v, product))
    if along > noise * length and found < LEAST_SHARE * along:
        return False, f"{finding}; holds {found / along:.0%} of the curvature along the gradient", known
    allowed = torch.maximum(BLOCK_AGREEMENT * wanted, DOUBTS * spread).clamp(min=max(SMALLEST_BLOCK * whole, noise))
    worst = int((missed / allowed).argmax()) if whole else 0
    if missed[worst] > allowed[worst]:
        share = float(missed[worst] / wanted[worst])
        return False, f"{finding}; tensor {worst} is {share:.0%} off", known
    return True, finding, known

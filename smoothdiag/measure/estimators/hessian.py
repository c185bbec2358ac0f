"""HessianNorm, Sharpness and DirectionalCurvature: the second derivative at a point, by Hessian-vector products."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from smoothdiag import arguments, vectors
from smoothdiag.measure.curvature import Backend, Choice, Hessian, check_backend, choose, hvp
from smoothdiag.measure.curvature.spectrum import MIN_PRODUCTS, Spectrum, Target, check_limits, lanczos
from smoothdiag.measure.estimators.base import Estimate, Status, Step
from smoothdiag.measure.estimators.blocks import Block, blocks_of
from smoothdiag.vectors import Vector

MOST_VECTORS = 8
"""Vectors that a search holds at once, beside the two gradients of a product and the copies that isolate it."""

WARM_PRODUCTS = 3
"""Fewest products: one of them follows a vector that could overtake the eigenvector found last time."""

END_ERROR = 0.01
"""Largest relative error at which a row reports the end of the spectrum that was not searched for."""

RECHECK_EVERY = 20
"""Measurements after which the backend is chosen anew, because terms of a loss may come and go."""

LARGEST_SPREAD = 0.1
"""Relative distance between products from two radii above which neither product counts as the Hessian's."""

Direction = Literal["gradient", "update"]


@dataclass(frozen=True)
class HessianNorm:
    """Largest magnitude of an eigenvalue of the Hessian at x_k: the ||H|| of the (L0, L1) law.

    Rows are named "hessian_norm", and "hessian_norm_preconditioned" for P^-1/2 H P^-1/2 if the optimizer divides by a
    known P. The value belongs to the loss on the measured data alone; on one minibatch it is larger than for the mean
    over many minibatches. Two vectors are kept as the start of the next measurement, which then takes three or four
    products if the data are the same, as they are by default. While a measurement lasts it holds at most twelve vectors
    of the size of x with products by differences, and what the graph takes with exact ones.

    Args:
        tol: Relative error of the eigenvalue at which the search stops.
        max_products: Largest number of Hessian-vector products; beyond it the row says ``not_converged``.
        backend: How products are made, as in ``hvp``. ``"auto"`` chooses at the first measured step, and again every
            twenty measured steps; a ``Choice`` is kept.
        autocast: Whether autocast regions of the loss stay active.
        by_group: Whether to measure the block of every parameter group too, which takes products of its own.

    Raises:
        ValueError: If ``tol`` is not in (0, 1), ``max_products`` is below 1 or ``backend`` is unknown.

    Units: smoothness [f/x^2]. Extra columns: ``eigenvalue_max`` and ``eigenvalue_min`` [f/x^2], both ends of the
    spectrum; ``residual``, the relative residual of the value; ``residual_max`` and ``residual_min``, the residuals of
    the two ends; ``num_hvps``; ``hvp``, how products were made, and ``hvp_reason``. The status belongs to the value.
    The search meets the other end only by chance: its column is NaN unless its value is known within 1%.
    Source: Zhang, He, Sra, Jadbabaie 2020 (ICLR), definition 1, for the quantity.

    Examples:
        >>> model = sd.problems.quadratic([-5.0, 1.0, 3.0]).as_module(torch.ones(3))
        >>> loss = sd.objective(model, lambda model, batch: model(), [None])
        >>> found = sd.HessianNorm()(sd.Step(0, loss, start=loss.point(), end=[torch.zeros(3)], lr=0.1))
        >>> print(round(found.smoothness, 2), found.extra["hvp"])
        5.0 retained
    """

    tol: float = 1e-3
    max_products: int = 40
    backend: Backend | Choice = "auto"
    autocast: bool = False
    by_group: bool = False

    def __post_init__(self) -> None:
        check_limits(self.tol, self.max_products)
        check_backend(self.backend)
        arguments.flag("autocast", self.autocast)
        arguments.flag("by_group", self.by_group)

    def __call__(self, step: Step) -> Estimate:
        """Returns the estimate."""
        return self._extreme(step, "hessian_norm", "norm")

    def _extreme(self, step: Step, name: str, target: Target) -> Estimate:
        def solve(block: Block, hessian: Hessian) -> Estimate:
            empty, key = block.empty(name), (name, block.suffix, block.group)
            before: Spectrum | None = step.memory.pop(key, None)
            least = MIN_PRODUCTS if before is None else WARM_PRODUCTS
            handed = _first_vectors(before, block.gradient(), step.index)
            del before  # nothing but the search holds the vectors now, so it frees what its basis contains
            found = lanczos(
                lambda v: block.times(hessian, v),
                handed.pop(),
                challenger=handed.pop() if handed else None,
                target=target,
                tol=self.tol,
                min_products=least,
                max_products=self.max_products,
                most_vectors=MOST_VECTORS,
                seed=step.index,
            )
            pair = found.pairs[0]
            if not math.isfinite(pair.value):
                return replace(empty, status=Status.NON_FINITE)
            step.memory[key] = found
            ends = _ends(found) | {"residual": pair.residual}
            value = found.norm if target == "norm" else pair.value
            estimate = replace(empty, smoothness=value, extra={**empty.extra, **ends})
            if not found.converged:
                return replace(estimate, status=Status.NOT_CONVERGED)
            return _at_two_scales(estimate, pair.vector, block, hessian)

        if self.by_group and not step.groups:
            raise ValueError(
                "Parameter `by_group` should be False if the probe has no groups. Found a probe without `group_by`."
            )
        blocks = blocks_of(step, by_group=self.by_group)
        return _measured(step, blocks, name, self.backend, self.autocast, solve)


def _first_vectors(before: Spectrum | None, gradient: Vector, seed: int) -> list[Vector]:
    """Returns the first vector of a search, and before it in the list the challenger, if there is one.

    The challenger is a vector in which an eigenvector shows that has overtaken the one found last time. Half of it is
    the challenger of the last search, and half the gradient, which has a large share in new ones. (At the points of a
    scan, the challenger alone missed an eigenvalue 1.4 times as large as the value that it reported.)
    """
    if before is None:
        return [vectors.mixed(gradient, seed=seed)]
    first, challenger = before.pairs[0].vector, before.challenger
    length = float(vectors.norm(gradient))
    if challenger is not None and 0 < length < math.inf:
        challenger = vectors.add_scaled(challenger, gradient, float(vectors.norm(challenger)) / length)
    return [first] if challenger is None else [challenger, first]


def _ends(found: Spectrum) -> dict[str, float]:
    """Returns the columns of both ends of a spectrum; the end that was searched for is always reported."""
    columns = {}
    for end, value, error in (
        ("max", found.largest, found.largest_error),
        ("min", found.smallest, found.smallest_error),
    ):
        is_wanted = found.converged and value == found.pairs[0].value
        columns[f"eigenvalue_{end}"] = value if is_wanted or error <= END_ERROR else math.nan
        columns[f"residual_{end}"] = found.pairs[0].residual if is_wanted else error
    return columns


@dataclass(frozen=True)
class Sharpness(HessianNorm):
    """Largest signed eigenvalue of the Hessian at x_k, which limits the learning rate.

    Rows are named "sharpness", and "sharpness_preconditioned" for P^-1/2 H P^-1/2, whose sharpness is what limits Adam
    and other adaptive optimizers. The column ``stability_limit`` holds the value above which the optimizer diverges on
    a quadratic: 2 / lr for gradient descent; `DirectionalCurvature` explains ``stability_limit_small_batch``, and
    ``HessianNorm`` the arguments and the other columns.

    Units: smoothness [f/x^2].
    Source: Cohen, Kaur, Li, Kolter, Talwalkar 2021 (ICLR); Cohen et al. 2022 for adaptive optimizers.

    Examples:
        The eigenvalue -5 is the largest in magnitude, but it does not limit the learning rate:

        >>> model = sd.problems.quadratic([-5.0, 1.0, 3.0]).as_module(torch.ones(3))
        >>> loss = sd.objective(model, lambda model, batch: model(), [None])
        >>> found = sd.Sharpness()(sd.Step(0, loss, start=loss.point(), end=[torch.zeros(3)], lr=0.1))
        >>> print(found.estimator, round(found.smoothness, 2))
        sharpness 3.0
    """

    def __call__(self, step: Step) -> Estimate:
        """Returns the estimate."""
        return self._extreme(step, "sharpness", "largest")


@dataclass(frozen=True)
class DirectionalCurvature:
    """Curvature v'Hv / ||v||^2 at x_k along the gradient or the update, of either sign, by one product.

    Along the gradient it is the batch sharpness, whose limit for small batches is ``stability_limit_small_batch``:
    2 / lr for SGD, (2 - 2b) / lr with momentum b. Rows are named "batch_sharpness" and "curvature_update". Rows with
    the suffix "_preconditioned" hold the same quotient of P^-1/2 H P^-1/2 along P^-1/2 g or P^1/2 d.

    What counts is the curvature that a step meets on its own batch. A probe therefore measures this estimator there,
    also if ``data="fixed"``, unless it has ``probe_batches``.

    Args:
        direction: ``"gradient"``, or ``"update"`` for x_{k+1} - x_k.
        backend: How products are made, as in ``HessianNorm``.
        autocast: Whether autocast regions of the loss stay active.

    Raises:
        ValueError: If ``direction`` or ``backend`` is unknown.

    Units: smoothness [f/x^2]. Extra columns: ``curvature_norm``, ||Hv|| / ||v|| [f/x^2]; ``slope``, <g, v> / ||v||
    [f/x], so that -slope / smoothness is the length of the best step along v if the loss is quadratic; ``num_hvps``,
    ``hvp`` and ``hvp_reason`` as for ``HessianNorm``.
    Source: Andreyev, Beneventano 2024, *Edge of stochastic stability*; Andreyev et al. 2026 for momentum.

    Examples:
        At x = (0, 2) the gradient of (x_1^2 + 3 x_2^2) / 2 is (0, 6), an eigenvector of the eigenvalue 3:

        >>> model = sd.problems.quadratic([1.0, 3.0]).as_module(torch.tensor([0.0, 2.0]))
        >>> loss = sd.objective(model, lambda model, batch: model(), [None])
        >>> found = sd.DirectionalCurvature()(sd.Step(0, loss, start=loss.point(), end=[torch.zeros(2)], lr=0.1))
        >>> print(found.estimator, round(found.smoothness, 2), round(found.extra["slope"], 2))
        batch_sharpness 3.0 6.0
    """

    of_step: ClassVar[bool] = True

    direction: Direction = "gradient"
    backend: Backend | Choice = "auto"
    autocast: bool = False

    def __post_init__(self) -> None:
        arguments.choice("direction", self.direction, get_args(Direction))
        check_backend(self.backend)
        arguments.flag("autocast", self.autocast)

    def __call__(self, step: Step) -> Estimate:
        """Returns the estimate."""
        name = "batch_sharpness" if self.direction == "gradient" else "curvature_update"

        def along(block: Block, hessian: Hessian) -> Estimate:
            empty, v = block.empty(name), block.gradient() if self.direction == "gradient" else block.update()
            length = float(vectors.norm(v))
            if length == 0:
                return replace(empty, status=Status.ZERO_STEP)
            v = [x / length for x in v]
            product = block.times(hessian, v)
            value, size = float(vectors.dot(v, product)), float(vectors.norm(product))
            if not math.isfinite(size):
                return replace(empty, status=Status.NON_FINITE)
            slope = float(vectors.dot(block.gradient(), v))
            found = replace(empty, smoothness=value, extra={**empty.extra, "curvature_norm": size, "slope": slope})
            return _at_two_scales(found, v, block, hessian)

        return _measured(step, blocks_of(step, by_group=False), name, self.backend, self.autocast, along)


def _at_two_scales(estimate: Estimate, v: Vector, block: Block, hessian: Hessian) -> Estimate:
    """Returns the estimate with the status from a product over a quarter of the radius; exact products skip this."""
    if hessian.radius is None:
        return estimate
    whole, fine = (block.times(matvec, v) for matvec in (hessian, hessian.finer))
    size, off = float(vectors.norm(whole)), float(vectors.norm(vectors.sub(whole, fine)))
    two_scale = float(vectors.norm(fine)) / size if size else math.nan
    differ = off > LARGEST_SPREAD * size
    return replace(estimate, two_scale=two_scale, status=Status.RADIUS_DEPENDENT if differ else Status.OK)


@dataclass
class _Chosen:
    """A chosen backend, the number of steps measured since it was chosen, and the last of these steps."""

    choice: Choice
    age: int = 0
    last: int = -1


def _measured(
    step: Step,
    blocks: list[Block],
    name: str,
    backend: Backend | Choice,
    autocast: bool,
    measure: Callable[[Block, Hessian], Estimate],
) -> Estimate:
    """Returns the result of ``measure`` for each block: the first as the estimate, the others as its parts."""
    if not step.starts_finite:
        return replace(blocks[0].empty(name), status=Status.NON_FINITE)
    key = ("hvp", backend, autocast)
    known: _Chosen | None = step.memory.get(key)
    reason: str | None = None
    if isinstance(backend, Choice):
        known = known or _Chosen(backend)
    elif backend != "auto":
        known = known or _Chosen(Choice(backend, "as set by `backend`", None if not autocast else step.gradient_error))
    elif known is None or (known.age >= RECHECK_EVERY and step.index != known.last):
        known = _Chosen(choose(step.objective, step.start, autocast=autocast))
        reason = known.choice.reason
    if step.index != known.last:
        known.age, known.last = known.age + 1, step.index
    step.memory[key] = known

    def attempt(choice: Choice) -> Estimate:
        # A caller that chose the backend goes from point to point; steps of a run keep nothing that could alter them.
        near = ("radius", choice.backend) if choice is backend else None
        with hvp(
            step.objective,
            step.start,
            backend=choice,
            autocast=autocast,
            gradient=step.at_start.gradient if step.full_precision and not autocast else None,
            radius=step.memory.get(near),
        ) as hessian:
            found = [measure(block, hessian) for block in blocks]
            if near is not None and hessian.next_radius is not None:
                step.memory[near] = hessian.next_radius
        how = {
            "num_hvps": hessian.num_hvps,
            "hvp": choice.backend,
            **({} if reason is None else {"hvp_reason": reason}),
        }
        if not choice.symmetric:
            found = [replace(e, status=Status.NOT_SYMMETRIC) if e.status.usable else e for e in found]
        return replace(found[0], extra={**found[0].extra, **how}, parts=tuple(found[1:]))

    try:
        return attempt(known.choice)
    except RuntimeError as error:
        # Memory may run out, or the loss may reach an operation that the check did not see. Ranks that disagree would
        # wait for each other for ever.
        if backend != "auto" or known.choice.backend == "central" or step.objective.distributed:
            raise
        reason = f"{known.choice.backend} failed at step {step.index}: {str(error).strip().splitlines()[0]}"
        del step.memory[key]  # the next measurement chooses anew
        return attempt(replace(known.choice, backend="central"))

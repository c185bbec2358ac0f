"""The Hessian of an objective as a linear operator: linearise once, then multiply."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from smoothdiag import arguments
from smoothdiag.measure.curvature.check import Choice, asked_for, choose
from smoothdiag.measure.curvature.operator import Hessian, opened
from smoothdiag.measure.curvature.quadrature import SpectralDensity, Trace, spectral_density, trace
from smoothdiag.measure.curvature.spectrum import Eigenpair, Spectrum, lanczos, power_iteration
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.vectors import Vector

__all__ = [
    "Backend",
    "Choice",
    "Eigenpair",
    "Hessian",
    "SpectralDensity",
    "Spectrum",
    "Trace",
    "check_backend",
    "choose",
    "hvp",
    "lanczos",
    "power_iteration",
    "spectral_density",
    "trace",
]

Backend = Literal["auto", "retained", "rebuilt", "central", "one_sided"]


@contextmanager
def hvp(
    objective: Objective,
    point: Vector | None = None,
    *,
    backend: Backend | Choice = "auto",
    autocast: bool = False,
    gradient: Vector | None = None,
    radius: float | None = None,
) -> Iterator[Hessian]:
    """Yields the Hessian of ``objective`` as an operator to multiply by; leaves no trace once the block ends.

    Args:
        objective: The loss.
        point: Where to differentiate, tensors shaped like the parameters; default: the present parameters.
        backend: How products are made.

            - ``"retained"``: differentiates twice in reverse and keeps the graph of the gradient. Exact, at two
              gradients per product.
            - ``"rebuilt"``: differentiates twice and builds the graph anew each time. Exact, at some three gradients,
              with less memory.
            - ``"central"``: takes the difference of gradients at two points. Two gradients, no more memory than
              training, accurate to about 1e-4 in float32; works wherever the model can be trained.
            - ``"one_sided"``: takes the difference of one further gradient and the gradient itself. One gradient,
              accurate to about 1e-3.
            - ``"auto"``: takes the first of retained (for one micro-batch), rebuilt and central that passes a check,
              which costs 15 to 40 gradients. A ``Choice``, as returned by ``choose``, is used without a check.
        autocast: Whether autocast regions of the loss stay active, which costs three gradients to find their rounding.
            If not, the loss is differentiated in the precision of the parameters.
        gradient: The gradient at ``point`` in the same precision, if you know it: one-sided products then do not take
            it again.
        radius: Length of the first displacement [x] of differences, as ``Hessian.next_radius`` of a point near by;
            ``None`` guesses it, which may take one more gradient or two.

    Raises:
        ValueError: If ``backend`` is unknown.

    Examples:
        >>> model = sd.problems.quadratic([1.0, 3.0]).as_module(torch.ones(2))
        >>> loss = sd.objective(model, lambda model, batch: model(), [None])
        >>> with sd.hvp(loss) as hessian: product = hessian([torch.tensor([1.0, 1.0])])
        >>> print(product[0].tolist(), hessian.backend)
        [1.0, 3.0] retained
    """
    if not isinstance(objective, Objective):
        raise arguments.wrong("objective", "an Objective, as `objective(model, loss_fn, batches)` returns", objective)
    arguments.flag("autocast", autocast)
    check_backend(backend)
    where = objective.point() if point is None else point
    if isinstance(backend, Choice):
        choice = backend
    elif backend == "auto":
        choice = choose(objective, where, autocast=autocast)
    else:
        choice = asked_for(objective, where, backend, autocast=autocast)
    with opened(
        objective,
        where,
        choice.backend,
        reason=choice.reason,
        gradient_error=choice.gradient_error,
        gradient=gradient,
        radius=radius,
        autocast=autocast,
    ) as hessian:
        yield hessian


def check_backend(backend: str | Choice) -> None:
    """Refuses an unknown backend.

    Raises:
        ValueError: If ``backend`` is neither a ``Choice`` nor one of ``Backend``.
    """
    if isinstance(backend, Choice):
        return
    arguments.choice("backend", backend, get_args(Backend))

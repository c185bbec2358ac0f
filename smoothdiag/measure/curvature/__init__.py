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
) -> Iterator[Hessian]:
    """Yields the Hessian of ``objective`` as an operator to multiply with; leaves no trace once it is closed.

    Args:
        objective: The loss.
        point: Where, tensors shaped like the parameters; default: their present values.
        backend: How products are made.

            - ``"retained"``: twice in reverse, the graph of the gradient kept: exact, two gradients a product.
            - ``"rebuilt"``: the same with the graph made anew each time: some three gradients, less memory.
            - ``"central"``: from gradients at two points: two gradients, no more memory than training, about 1e-4
              accurate in float32, and runs wherever the model can be trained.
            - ``"one_sided"``: from one point and the gradient itself: one gradient, about 1e-3 accurate.
            - ``"auto"``: the first of retained (for one micro-batch), rebuilt and central that passes a check, which
              costs 15 to 40 gradients. A ``Choice``, as returned by ``choose``, is used as it is.
        autocast: Whether autocast regions of the loss stay in force, at three gradients to see how exact they are.
            Without, the Hessian is that of the loss in the precision of the parameters.

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
        raise arguments.wrong("objective", "an Objective, as from `objective(model, loss_fn, batches)`", objective)
    arguments.flag("autocast", autocast)
    if not isinstance(backend, Choice):
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
        autocast=autocast,
    ) as hessian:
        yield hessian


def check_backend(backend: str) -> None:
    """Refuses an unknown way of multiplying.

    Raises:
        ValueError: If ``backend`` is none of ``Backend``.
    """
    arguments.choice("backend", backend, get_args(Backend))

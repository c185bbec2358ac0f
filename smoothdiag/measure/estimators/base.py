"""What an estimator receives and returns: Step, Estimate, Status."""

import math
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from smoothdiag import vectors
from smoothdiag.adapters import UNKNOWN, Ball, StabilityLimit
from smoothdiag.geometry import Diagonal, Euclidean, Geometry, Part, Parts, Product
from smoothdiag.geometry.vector import whitened
from smoothdiag.measure.loss.objective import Evaluation, Objective
from smoothdiag.packing import Packing
from smoothdiag.rows import Status
from smoothdiag.tally import Tally
from smoothdiag.vectors import Vector

__all__ = ["Estimate", "Estimator", "Status", "Step"]

EUCLIDEAN = Euclidean()

PRECONDITIONED = "_preconditioned"
"""Suffix of the estimator's name in rows that are measured in the optimizer's own norm."""


OWN = "_own"
"""Suffix of the estimator's name in rows of ``geometry="optimizer"``."""

OWN_PART = "own norm"
"""Group of a row in the optimizer's own norm, if that is not a norm of all parameters."""


class Contradicted(Exception):
    """The gradient of the training loop is not that of the loss, as far as the gradients at two other points tell."""


@dataclass(frozen=True)
class Step:
    """One optimizer step, frozen: where it started, where it ended, and the loss to measure it with.

    Attributes:
        index: Number of optimizer steps before this one.
        objective: The loss on the data of this step, or on fixed or held-out data.
        start: Parameters x_k before the step.
        end: Parameters x_{k+1} after the step.
        lr: Learning rate of the step [x^2/f]; NaN if parameter groups have different rates.
        gradient_error: Relative error of one gradient evaluation, ||g - g'|| / ||g||.
        groups: For each group with an estimate of its own, the indices of its parameters.
        preconditioner: Diagonal of the matrix P that the optimizer divides by; ``None`` if it has none.
        known_start: Loss and gradient at ``start``, if they are known already.
        memory: What estimators keep from one measured step for the next, each under its own keys.
        stability_limit: Curvature [f/x^2] above which the optimizer diverges on a quadratic at its present learning
            rate, and the norm in which that curvature is measured.
        training: The gradient that the training loop had at ``start``. Estimators with the attribute ``checks_start``
            take it for that of the loss, which costs a forward pass instead of a gradient, and raise `Contradicted` if
            their own gradients do not go with it.
        balls: For each parameter, the ball that its optimizer takes steps from, see `smoothdiag.adapters.unit_balls`.
        full_precision: Whether ``known_start`` was evaluated without autocast, as products with the Hessian are. These
            may then use its gradient.

    Examples:
        >>> model = sd.problems.quadratic([3.0]).as_module(torch.zeros(1))
        >>> loss = sd.objective(model, lambda model, batch: model(), [None])
        >>> step = sd.Step(0, loss, start=[torch.tensor([2.0])], end=[torch.tensor([1.0])], lr=1 / 6)
        >>> print(step.at_start.loss, step.at_start.gradient[0].item())
        6.0 6.0
    """

    index: int
    objective: Objective = field(repr=False)
    start: Vector = field(repr=False)
    end: Vector = field(repr=False)
    lr: float
    gradient_error: float = 0.0
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict, repr=False)
    preconditioner: Vector | None = field(default=None, repr=False)
    known_start: Evaluation | None = None
    memory: MutableMapping[Hashable, Any] = field(default_factory=dict, repr=False)
    stability_limit: StabilityLimit = UNKNOWN
    training: Vector | None = field(default=None, repr=False)
    full_precision: bool = False
    balls: Sequence[Ball | None] = field(default=(), repr=False)
    _norms: dict[Geometry, dict[tuple[str, str], float]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def at_start(self) -> Evaluation:
        """Loss and gradient at ``start``, evaluated at most once for all estimators."""
        return self.known_start or self._begun[0]

    @cached_property
    def starts_finite(self) -> bool:
        """Whether loss and gradient at ``start`` are finite; otherwise there is nothing to measure."""
        return math.isfinite(self.at_start.loss) and math.isfinite(self._gradient_sums.total("gradient"))

    def learn(self, other: "Step") -> None:
        """Takes over what another object of the same step knows about its start."""
        for name in ("at_start", "_begun"):
            if name in other.__dict__:
                self.__dict__.setdefault(name, other.__dict__[name])

    def forget_start(self) -> None:
        """Forgets loss and gradient at the start, so that they are evaluated when they are asked for."""
        for name in ("at_start", "starts_finite", "_begun", "_gradient_sums", "_point_sums"):
            self.__dict__.pop(name, None)
        self._norms.clear()

    def block(self, group: str) -> Sequence[int]:
        """Returns the indices of the parameters of a group, or of "all"."""
        if group == OWN_PART and group not in self.groups:
            return self.own.parts[0].indices
        return range(len(self.start)) if group == "all" else self.groups[group]

    def norm_of_start(self, group: str = "all") -> float:
        """Returns ||x_k|| over the parameters of a group [x]."""
        return math.sqrt(self._point_sums.total("point", self.block(group)))

    def norms_of_gradient(self, geometry: Geometry = EUCLIDEAN) -> dict[tuple[str, str], float]:
        """Returns the dual norm of the gradient at ``start`` by (suffix of the estimator's name, group) [f/x]."""
        if isinstance(geometry, Parts) and geometry not in self._norms:
            gradient = self.at_start.gradient
            self._norms[geometry] = {(OWN, part.name): part.dual_norm(gradient) for part in geometry.parts}
        if geometry not in self._norms:
            self._norms[geometry] = {
                (suffix, group): math.sqrt(self._gradient_sums.total("gradient" + suffix, self.block(group)))
                if suffix or type(geometry) is Euclidean
                else float(geometry.dual_norm([self.at_start.gradient[i] for i in self.block(group)]))
                for suffix, group in self.keys
            }
        return self._norms[geometry]

    @cached_property
    def own(self) -> Parts:
        """The norm in which the optimizer steps: of all parameters, or of those that have one, and of the groups.

        It is the largest of the norms of tensors, each in units of the radius, where steps come from `balls`. It is the
        norm of P for an optimizer with a preconditioner. A group has a norm if all of its parameters do.

        Raises:
            ValueError: If the optimizer does not tell any such norm.
        """
        told = tuple(i for i, ball in enumerate(self.balls) if ball is not None)
        if not told and self.preconditioner is None:
            raise ValueError(
                "Parameter `geometry` should be a norm, because this optimizer is not known to step in a norm other "
                'than the Euclidean one; Muon, Lion, ClippedScion and Adam are. Found `geometry = "optimizer"`.'
            )
        every = tuple(range(len(self.start)))
        wanted = {"all": every, **{name: tuple(indices) for name, indices in self.groups.items()}}
        if told and told != every:
            wanted = {OWN_PART: told, **wanted}
        return Parts(
            tuple(
                Part(name, indices, self._own_norm_of(indices))
                for name, indices in wanted.items()
                if indices and (not told or set(indices) <= set(told))
            )
        )

    def _own_norm_of(self, indices: Sequence[int]) -> Geometry:
        balls = [ball for ball in (self.balls[i] for i in indices if self.balls) if ball is not None]
        if balls:
            return Product(tuple(layer for layer, _ in balls), tuple(radius for _, radius in balls))
        assert self.preconditioner is not None
        return Diagonal(tuple(self.preconditioner[i] for i in indices))

    @property
    def keys(self) -> list[tuple[str, str]]:
        """(Suffix of the estimator's name, group) of every row, all parameters first."""
        return [(suffix, group) for suffix in self.suffixes for group in ("all", *self.groups)]

    @property
    def suffixes(self) -> list[str]:
        """Suffixes of the estimator's name in the two norms that rows are measured in."""
        return ["", *([] if self.preconditioner is None else [PRECONDITIONED])]

    def weights(self, packing: Packing, k: int) -> list[Tensor]:
        """Returns a piece of the preconditioner; an empty list if there is none."""
        return [] if self.preconditioner is None else [packing.piece(k, self.preconditioner)]

    @cached_property
    def _begun(self) -> tuple[Evaluation, Tally]:
        gradient: list[Any] = [None] * len(self.start)

        def go(tally: Tally, k: int, targets: list[Tensor]) -> None:
            packing = tally.packing
            with packing.pieces[k].writing(targets) as into:
                self._add_start(tally, k, into)
            if self.training is not None:
                self._add_gradient(tally, k, packing.piece(k, self.training))

        def keep(tally: Tally, k: int, found: list[Tensor]) -> None:
            tally.packing.put(k, gradient, found)
            self._add_gradient(tally, k, tally.packing.pieces[k].of(found))

        if self.training is not None:
            tally = self.objective.look(go)
            # The loop still has these gradients, so whoever reads them gets copies.
            lent = tally.packing.keep(self.training, lends=lambda x: True).guarded()
            return Evaluation(tally.total("loss"), lent), tally
        tally = self.objective.sweep(go, keep)
        return Evaluation(tally.total("loss"), gradient, self.objective.variance(tally)), tally

    @cached_property
    def _point_sums(self) -> Tally:
        if "_begun" in self.__dict__:
            return self._begun[1]
        tally = Tally(self.objective.packing)
        for k in range(len(tally.packing.pieces)):
            self._add_start(tally, k)
        return tally

    @cached_property
    def _gradient_sums(self) -> Tally:
        if self.known_start is None:
            return self._begun[1]
        tally = Tally(self.objective.packing)
        for k in range(len(tally.packing.pieces)):
            self._add_gradient(tally, k, tally.packing.piece(k, self.known_start.gradient))
        return tally

    def _add_start(self, tally: Tally, k: int, into: Tensor | None = None) -> None:
        """Adds the squares of the start, and writes it somewhere in passing."""

        def go(x: Tensor, *into: Tensor) -> list[Tensor]:
            for target in into:
                target.copy_(x)
            return [x]

        start = vectors.wide(tally.packing.piece(k, self.start))
        tally.squares(k, ["point"], go, start, *(() if into is None else (into,)))

    def _add_gradient(self, tally: Tally, k: int, gradient: Tensor) -> None:
        names = ["gradient" + suffix for suffix in self.suffixes]
        tally.squares(
            k,
            names,
            lambda g, *weights: [vectors.wide(g), *(whitened(vectors.wide(g), p) for p in weights)],
            gradient,
            *self.weights(tally.packing, k),
        )


@dataclass(frozen=True)
class Estimate:
    """One measurement of local smoothness.

    Attributes:
        estimator: Name of the estimator, as in the column ``estimator`` of a trace.
        smoothness: Local smoothness [f/x^2].
        grad_norm: Dual norm of the gradient at the start of the step [f/x].
        step_norm: Length of the displacement between the two points [x], as really made after rounding.
        loss: Loss at the start of the step [f].
        saturation: smoothness x displacement / (sum of the two gradient norms), in [0, 1].
        noise_floor: Smoothness [f/x^2] that rounding and irreproducible gradients would show without any curvature.
        two_scale: Smoothness over a quarter of the displacement, divided by smoothness over the whole displacement.
        status: How far to trust the estimate.
        group: Parameter group that was measured; "all" for all parameters.
        parts: Estimates for parameter groups and in the optimizer's norm, from the same gradients.
        extra: Further columns of the row.

    Examples:
        Smoothness times step length is the change of the gradient along the step:

        >>> found = sd.Estimate("path", smoothness=3.0, grad_norm=6.0, step_norm=0.5, loss=6.0)
        >>> print(found.smoothness * found.step_norm, found.group, found.status.name)
        1.5 all OK
    """

    estimator: str
    smoothness: float
    grad_norm: float
    step_norm: float
    loss: float
    saturation: float = math.nan
    noise_floor: float = math.nan
    two_scale: float = math.nan
    status: Status = Status.OK
    group: str = "all"
    parts: tuple["Estimate", ...] = ()
    extra: Mapping[str, float | str] = field(default_factory=dict)


class Estimator(Protocol):
    """Measures local smoothness at a step.

    An estimator whose value is about the batch that the step was taken on has an attribute ``of_step`` that is True:
    a probe never measures it on fixed batches.

    Examples:
        An estimator of your own is a function, passed as ``sd.Probe(..., estimators=[loss_of_step])``:

        >>> nan = float("nan")
        >>> def loss_of_step(step: sd.Step) -> sd.Estimate: return sd.Estimate("own", nan, nan, nan, step.at_start.loss)
        >>> loss = sd.objective(nn.Linear(1, 1), lambda model, x: model(x).square(), [torch.zeros(1)])
        >>> start, end = [torch.zeros(1, 1), torch.full((1,), 3.0)], [torch.zeros(1, 1), torch.zeros(1)]
        >>> loss_of_step(sd.Step(0, loss, start, end, lr=0.5)).loss
        9.0
    """

    def __call__(self, step: Step) -> Estimate:
        """Returns one measurement; a numerical problem is a status, not an exception."""
        ...


def noise_columns(variance: float, squared_norm: float) -> dict[str, float]:
    """Returns the columns of gradient noise, from the variance of the gradient and an unbiased estimate of ||g||^2.

    ``grad_variance`` is the trace of the covariance of the gradient [f^2/x^2]. ``noise_scale`` is its ratio to the
    squared norm of the full gradient: with that many batches like this one, noise and gradient would be equally large.

    Source: McCandlish, Kaplan, Amodei 2018, the simple noise scale, which they count in examples.
    """
    if not math.isfinite(variance):
        return {}
    return {"grad_variance": variance, "noise_scale": variance / squared_norm if squared_norm > 0 else math.inf}

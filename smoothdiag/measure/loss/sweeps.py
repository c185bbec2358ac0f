"""Sweeps: evaluates a loss and hands its gradient on piece by piece, so that the gradient need not be held."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smoothdiag import vectors
from smoothdiag.measure.loss.batches import MicroBatch
from smoothdiag.measure.loss.delivery import ArrivedTwice, Delivery, Take, take_gradient
from smoothdiag.measure.loss.replicas import Replicas
from smoothdiag.measure.loss.shares import Shares
from smoothdiag.measure.loss.state import ModuleState
from smoothdiag.packing import Packing
from smoothdiag.tally import Tally
from smoothdiag.vectors import Vector

WHOLE = "whole gradient"
"""Name of the sums of a sweep for the gradient, where the sweep itself needs them."""

Place = Callable[[Tally, int, list[Tensor]], None]
"""Moves the parameters of one piece of x, given by its number, to a point; it may add sums to the tally."""


@dataclass(frozen=True)
class Evaluation:
    """The loss and its gradient at one point.

    Attributes:
        loss: Loss [f].
        gradient: Gradient [f/x], one tensor per parameter.
        variance: Trace of the covariance of ``gradient`` [f^2/x^2], estimated from micro-batches of equal
            weight; NaN if there is only one.
    """

    loss: float
    gradient: Vector = field(repr=False)
    variance: float = math.nan


class Sweeps(Shares, ABC):
    """Evaluates the loss and its gradient; a subclass knows how to leave no trace.

    Attributes: see `smoothdiag.measure.loss.objective.Objective`.
    """

    parameters: list[nn.Parameter]
    packing: Packing
    replicas: Replicas
    distributed: bool
    num_grads: int
    loss_scale: float
    _state: ModuleState

    @abstractmethod
    def isolated(self) -> AbstractContextManager[None]:
        """Saves everything an evaluation may touch and puts it back; cheap when already inside."""

    @abstractmethod
    def place(self, point: Vector | Callable[[int, list[Tensor]], None] | None = None) -> None:
        """Moves to ``point``, and the rest back to the start; call it inside ``isolated``."""

    @abstractmethod
    def _backward(
        self, micro: MicroBatch, inspect: Callable[[Tensor], None] | None, within: AbstractContextManager[Any]
    ) -> Tensor:
        """Takes the gradient of one micro-batch, ``within`` a context, and returns its loss.

        The context is closed during the forward pass, in which ``loss_fn`` may call ``backward`` and read ``.grad``.
        """

    def evaluate(self, point: Vector | None = None, inspect: Callable[[Tensor], None] | None = None) -> Evaluation:
        """Returns the loss and its gradient at ``point`` (default: the present parameter values).

        Args:
            point: Where to evaluate, one tensor per parameter.
            inspect: Called with the loss of each micro-batch before ``backward``.

        Raises:
            ValueError: If ``loss_fn`` returns anything but a scalar tensor that depends on the parameters.
        """
        gradient: list[Any] = [None] * len(self.parameters)

        def keep(tally: Tally, k: int, found: list[Tensor]) -> None:
            tally.packing.put(k, gradient, found)

        tally = self.sweep(point, keep, inspect)
        return Evaluation(tally.total("loss"), gradient, self.variance(tally))

    def sweep(
        self,
        point: Vector | Place | None,
        take: Callable[[Tally, int, list[Tensor]], None],
        inspect: Callable[[Tensor], None] | None = None,
    ) -> Tally:
        """Evaluates the gradient at a point, and hands it on piece by piece, so that it need not be held as a whole.

        Args:
            point: Where to evaluate: a vector, or a function that moves the parameters of one piece there.
            take: Called with the gradients of each piece, which it must not write to. It may add sums to the tally.
            inspect: As in ``evaluate``.

        Returns:
            What ``point`` and ``take`` have added, and the ``loss``.
        """
        while True:
            tally = Tally(self.packing)
            try:
                self._sweep(tally, point, take, inspect)
            except ArrivedTwice:
                self._state.hands_on = False
                continue
            if self.loss_scale == 1 or not math.isfinite(tally.total("loss")) or math.isfinite(tally.total(WHOLE)):
                return tally
            self.loss_scale /= 16

    def _sweep(
        self,
        tally: Tally,
        point: Vector | Place | None,
        take: Callable[[Tally, int, list[Tensor]], None],
        inspect: Callable[[Tensor], None] | None,
    ) -> None:
        with self.isolated(), torch.enable_grad():
            self.place(point if point is None or isinstance(point, Sequence) else partial(point, tally))
            self.num_grads += 1
            total: dict[int, list[Tensor]] = {}
            num, reached = len(self._micro_batches), False
            loss = self._nothing()
            # Averages over replicas and gathered shards come after backward, so hooks within it do not see them.
            early = self._state.hands_on and not self.distributed
            for number, micro in enumerate(self._micro_batches, start=1):

                def arrive(k: int, found: list[Tensor], is_last: bool = number == num) -> None:
                    if num > 1:
                        tally.squares(k, ["micro"], _itself, tally.packing.pieces[k].of(found))
                        before = total.pop(k, None)
                        found = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
                    if not is_last:
                        total[k] = found
                        return
                    if num > 1 or self.loss_scale != 1:
                        tally.squares(k, [WHOLE], _itself, tally.packing.pieces[k].of(found))
                    take(tally, k, found)

                if self.replicas:
                    share, is_reached = self._average(micro, inspect, arrive)
                else:
                    delivery = Delivery(
                        self.packing, self.parameters, lambda k, found: arrive(k, self._unscaled(found)), early=early
                    )
                    share = self._backward(micro, inspect, delivery)
                    delivery.finish()
                    is_reached = delivery.has_any
                loss, reached = loss + share.to(loss), reached or is_reached
            if not reached:
                raise ValueError(
                    "Parameter `loss_fn` should return a loss that depends on the parameters the optimizer holds. "
                    "Found no gradient for any of them. Let loss_fn use the model that it is given, not another one."
                )
            self._add_loss(tally, loss)

    def _average(
        self, micro: MicroBatch, inspect: Callable[[Tensor], None] | None, arrive: Take
    ) -> tuple[Tensor, bool]:
        """Takes the mean of one micro-batch over replicas: hands on its gradient, and returns its loss."""
        with self.replicas.apart():
            share = float(self._backward(micro, inspect, nullcontext()))
            reached = any(p.grad is not None for p in self.parameters)
            part = self._unscaled([take_gradient(p) for p in self.parameters])
        share, part = self.replicas.average(share, part)
        for k in range(len(self.packing.pieces)):
            arrive(k, self.packing.take(k, part))
        return torch.tensor(share, dtype=torch.float64), reached

    def _unscaled(self, gradients: list[Tensor]) -> list[Tensor]:
        return gradients if self.loss_scale == 1 else [g / self.loss_scale for g in gradients]

    def variance(self, tally: Tally) -> float:
        """Returns ``Evaluation.variance`` of a sweep."""
        k = len(self._micro_batches)
        if k < 2 or len({micro.weight for micro in self._micro_batches}) > 1:
            return math.nan
        # The parts g_i add up to g, for a mean as for a sum: Var(g) = k Var(g_i), unbiased with k - 1.
        return (k * tally.total("micro") - tally.total(WHOLE)) / (k - 1)

    def value(self, point: Vector | None = None) -> float:
        """Returns the loss at ``point`` by forward passes only."""
        return self.look(point).total("loss")

    def look(self, point: Vector | Place | None) -> Tally:
        """Evaluates the loss alone, by forward passes; the tally is as for ``sweep``."""
        tally = Tally(self.packing)
        # Gradients stay enabled although none is taken: without them, compiled models and fused kernels differ.
        with self.isolated(), torch.enable_grad():
            self.place(point if point is None or isinstance(point, Sequence) else partial(point, tally))
            loss = self._nothing()
            with self.replicas.apart():
                for micro in self._micro_batches:
                    loss = loss + self._loss(micro).detach().to(loss)
            self._add_loss(tally, loss.new_tensor(self.replicas.mean(float(loss))) if self.replicas else loss)
        return tally

    def _nothing(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)

    def _add_loss(self, tally: Tally, loss: Tensor) -> None:
        # With replicas the loss is a mean already.
        tally.number("loss", loss, is_mean=self.distributed and not self.replicas)


def _itself(piece: Tensor) -> list[Tensor]:
    return [vectors.wide(piece)]

"""Shares: the losses of micro-batches and their weights, which add up to the loss of a step."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from torch import Tensor, nn

from smoothdiag import vectors
from smoothdiag.measure.loss.batches import MicroBatch, copied, cut, map_tensors

LossFn = Callable[[nn.Module, Any], Tensor]
Reduction = Literal["mean", "sum"]


class Shares:
    """The loss on fixed micro-batches at the parameters that the model has.

    Args:
        model: The model that ``loss_fn`` is called with.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar loss of one micro-batch.
        micro_batches: The data of the loss.
        reduction: ``"mean"`` or ``"sum"`` of the micro-batch losses that have no weight of their own.

    Attributes:
        model: The model.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, micro_batches: Sequence[MicroBatch], reduction: Reduction
    ) -> None:
        self.model, self._loss_fn = model, loss_fn
        self._micro_batches, self._reduction = list(micro_batches), reduction

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches in the loss."""
        return len(self._micro_batches)

    def halves(self) -> tuple[Self, Self]:
        """Returns the loss on two disjoint halves of the data, each weighted as if it were the whole.

        Several micro-batches go to the halves in turn; a single one is cut along the first dimension of its tensors.

        Raises:
            ValueError: If there is only one micro-batch and it cannot be cut.
        """
        if len(self._micro_batches) > 1:
            weights = [self._weight(micro) for micro in self._micro_batches]
            parts = []
            for chosen in (slice(0, None, 2), slice(1, None, 2)):
                scale = sum(weights) / sum(weights[chosen])
                pairs = zip(self._micro_batches[chosen], weights[chosen], strict=True)
                parts.append([replace(micro, weight=weight * scale) for micro, weight in pairs])
        else:
            (micro,) = self._micro_batches
            parts = [[replace(micro, batch=half)] for half in cut(micro.batch)]
        return self.on(parts[0]), self.on(parts[1])

    def on(self, micro_batches: Sequence[MicroBatch]) -> Self:
        """Returns the same loss on other data, evaluated at the same place in the run."""
        twin = copy.copy(self)
        twin._micro_batches = list(micro_batches)
        return twin

    @property
    def is_one_function(self) -> bool:
        """Whether all micro-batches were met with the same parameters outside x."""
        return not any(micro.others for micro in self._micro_batches)

    @property
    def _is_widened(self) -> bool:
        """Whether float16 and bfloat16 tensors are float32 at present."""
        return False

    def _loss(self, micro: MicroBatch) -> Tensor:
        """Returns the share of one micro-batch in the loss."""
        micro.random_state.restore()
        for tensor, value in micro.others:
            vectors.assign_([tensor], [value])
        # A copy each time: loss_fn may write to tensors and take entries out of containers.
        batch = map_tensors(micro.batch, self._copy)
        try:
            loss = self._loss_fn(self.model, batch)
        except Exception as error:
            error.add_note("This error came from loss_fn(model, batch), which was called again to measure.")
            if self._is_widened:
                error.add_note(
                    "Parameters in float16 or bfloat16 are float32 while they are measured. If loss_fn casts tensors "
                    "by hand, let it cast to the present dtype of the model: x.to(next(model.parameters()).dtype)."
                )
            raise
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"Parameter `loss_fn` should return a scalar tensor, such as a mean. Found {found}.")
        loss = loss.reshape(())
        if micro.weight is not None:
            return loss * micro.weight
        # A training loop divides too; multiplying by the reciprocal would differ in the last bit.
        return loss / len(self._micro_batches) if self._reduction == "mean" else loss

    def _copy(self, tensor: Tensor) -> Tensor:
        twin = copied(tensor)
        return (vectors.widened(twin) if self._is_widened else twin).requires_grad_(tensor.requires_grad)

    def _weight(self, micro: MicroBatch) -> float:
        if micro.weight is not None:
            return micro.weight
        return 1 / len(self._micro_batches) if self._reduction == "mean" else 1.0

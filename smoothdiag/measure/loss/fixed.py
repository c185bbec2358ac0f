"""A loss on fixed batches, for measuring outside a training loop."""

from collections.abc import Iterable
from typing import Any, get_args

from torch import nn

from smoothdiag import arguments
from smoothdiag.measure.loss.batches import held_out
from smoothdiag.measure.loss.coordinates import is_distributed
from smoothdiag.measure.loss.objective import LossFn, Objective, Reduction


def objective(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], *, reduction: Reduction = "mean", seed: int = 0
) -> Objective:
    """Returns the loss on fixed batches as a deterministic function of the model's trainable parameters.

    Args:
        model: The model. It is evaluated in its present mode, train or eval.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar loss of one batch.
        batches: The batches; each is a micro-batch.
        reduction: Whether the loss is the ``"mean"`` or the ``"sum"`` of the batches' losses.
        seed: Seed of the random state that every batch starts from.

    Raises:
        ValueError: If there are no batches, if nothing in the model is trainable, or if an argument is of the wrong
            kind.

    Examples:
        The loss w^2 of a layer with one weight w, at the weight 3:

        >>> model = nn.Linear(1, 1, bias=False)
        >>> loss = sd.objective(model, lambda model, x: model(x).square(), [torch.ones(1)])
        >>> loss.value([torch.tensor([[3.0]])])
        9.0
    """
    if not isinstance(model, nn.Module):
        raise arguments.wrong("model", "a torch.nn.Module", model)
    arguments.called("loss_fn", loss_fn, "callable as loss_fn(model, batch)")
    if isinstance(batches, str | type | nn.Module) or not isinstance(batches, Iterable):
        raise arguments.wrong("batches", "an iterable of batches, such as [batch]", batches)
    arguments.choice("reduction", reduction, get_args(Reduction))
    arguments.whole("seed", seed, 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("Parameter `model` should have trainable parameters. Found none that require a gradient.")
    return Objective(
        model,
        loss_fn,
        held_out(batches, seed, parameters, "batches"),
        parameters,
        reduction=reduction,
        widen_half=True,
        distributed=is_distributed(model, parameters),
    )

"""Calls: the calls of a model that returns its loss, and the loss in what it returns."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smoothdiag.measure.loss.batches import map_tensors
from smoothdiag.measure.loss.beside import modules_beside
from smoothdiag.measure.loss.factors import Factor
from smoothdiag.memory import is_out_of_memory

Casts = tuple[tuple[str, bool, torch.dtype, bool], ...]
"""For each type of device whether autocast is enabled, its dtype, and whether it keeps cast weights."""


@dataclass(frozen=True)
class Call:
    """A call of a model in the training loop.

    Attributes:
        args: Its positional arguments.
        kwargs: Its arguments by name.
        casts: The state of autocast at that time.
        factor: How much the returned loss counts in the step.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    casts: Casts
    factor: Factor = field(default_factory=Factor)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """Returns a call that is about to happen."""
        return cls(_spared(args), _spared(kwargs), present_casts())

    def again(self, model: nn.Module) -> Any:
        """Returns what the model returns if it is called with the same arguments, under the same autocast."""
        with autocast_as(self.casts):
            return model(*_spared(self.args), **_spared(self.kwargs))


def returned_loss(model: nn.Module, batch: Any) -> Tensor:
    """Returns the loss that a model computes by itself.

    It is the ``loss_fn`` of a `Probe` that was given none. The loss is the scalar that the model returns; or the
    attribute ``loss`` of what it returns, as in Hugging Face Transformers; or the entry ``"loss"`` of a mapping; or
    the first scalar in a tuple or list.

    Args:
        model: The model.
        batch: A mapping holds the arguments by name, a tuple or list holds them in order, and anything else is the
            only argument.

    Raises:
        ValueError: If the model returns no loss; the message says what it returned.

    Examples:
        >>> loss = sd.returned_loss(nn.MSELoss(), (torch.zeros(2), torch.tensor([1.0, 3.0])))
        >>> loss.item()
        5.0
    """
    if isinstance(batch, Call):
        found = batch.again(model)
    elif isinstance(batch, Mapping):
        found = model(**batch)
    else:
        found = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    loss = loss_in(found)
    if loss is None:
        raise needed(no_loss(found))
    return loss


def loss_in(found: Any) -> Tensor | None:
    """Returns the loss in what a model has returned; ``None`` if there is none."""
    if isinstance(found, Tensor):
        return found if _is_scalar(found) else None
    named = getattr(found, "loss", None)
    if named is None and isinstance(found, Mapping):
        named = found.get("loss")
    if isinstance(named, Tensor):
        return named if _is_scalar(named) else None
    if not isinstance(found, tuple | list):
        return None
    scalars = [value for value in found if isinstance(value, Tensor) and _is_scalar(value)]
    # An accuracy has no graph. The logits of a single example are one number too, but they keep their dimensions.
    return min(scalars, key=lambda value: (not value.requires_grad, value.dim() > 0), default=None)


def no_loss(found: Any) -> str:
    """Returns why ``loss_in`` finds no loss in what a model has returned."""
    return (
        'the model returned no scalar tensor, attribute `loss` or entry "loss" that is a scalar. Found '
        f"{_described(found)}. If the model computes its loss only when it gets labels, pass them"
    )


def needed(reason: str) -> ValueError:
    """Returns the error for a loop whose loss is not the one that the model returns."""
    return ValueError(
        f"Parameter `loss_fn` is needed, because {reason}. Otherwise pass `loss_fn(model, batch)`, which returns the "
        "loss of one micro-batch as the loop computes it, and iterate over probe.watch(loader)."
    )


def _is_scalar(value: Tensor) -> bool:
    return value.numel() == 1 and value.is_floating_point()


def _described(found: Any, depth: int = 0) -> str:
    kind = type(found).__name__
    if isinstance(found, Tensor):
        return f"a {kind} of shape {tuple(found.shape)} in {str(found.dtype).removeprefix('torch.')}"
    if depth < 2 and isinstance(found, Mapping):
        return f"{kind}({', '.join(f'{key}: {_described(value, depth + 1)}' for key, value in found.items())})"
    if depth < 2 and isinstance(found, tuple | list):
        return f"{kind}({', '.join(_described(value, depth + 1) for value in found)})"
    return "None" if found is None else f"an object of type {kind}"


def present_casts() -> Casts:
    """Returns the state of autocast now."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    keeps = torch.is_autocast_cache_enabled()
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), keeps) for kind in kinds)


@contextmanager
def autocast_as(casts: Casts) -> Iterator[None]:
    """Runs a block under the state of autocast that ``casts`` holds."""
    with ExitStack() as stack:
        for wanted, present in zip(casts, present_casts(), strict=True):
            if wanted != present:
                kind, is_enabled, dtype, keeps = wanted
                stack.enter_context(torch.autocast(kind, dtype, enabled=is_enabled, cache_enabled=keeps))
        yield


def _spared(arguments: Any) -> Any:
    """Returns arguments whose containers and objects a forward pass may write to, as it does to caches of keys."""
    return map_tensors(arguments, lambda tensor: tensor, _copied)


def _copied(value: Any) -> Any:
    if callable(value) or modules_beside(nn.Module(), value):
        return value
    try:
        return copy.deepcopy(value)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return value

"""Isolation: everything that evaluating a loss may touch in a run, saved before and put back after."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from smoothdiag import vectors
from smoothdiag.measure.loss.batches import RandomState, devices_of
from smoothdiag.measure.loss.coordinates import reshard
from smoothdiag.measure.loss.faults import put_back
from smoothdiag.measure.loss.state import ModuleState, Snapshot
from smoothdiag.rows import SmoothdiagWarning

Gradients = list[tuple[Tensor, Tensor | None, Tensor | None]]


@dataclass
class Isolated:
    """A model while its loss is evaluated.

    Attributes:
        start: What every evaluation starts from, beside x.
        holders: All that ``backward`` may give a gradient to: x, and parameters that stay where they are.
        is_widened: Whether some parameters or buffers are float32 meanwhile, which otherwise are narrower.
        strays: Gradients of tensors outside the model, as they were.
        widened_dtypes: The dtypes that parameters outside x otherwise have, where they are float32 meanwhile.
    """

    start: Snapshot
    holders: list[Tensor]
    is_widened: bool
    strays: dict[Tensor, Tensor | None] = field(default_factory=dict)
    widened_dtypes: set[torch.dtype] = field(default_factory=set)


@contextmanager
def isolation(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    state: ModuleState,
    start: Snapshot | None,
    *,
    widen_half: bool,
) -> Iterator[Isolated]:
    """Saves parameters, buffers, gradients, modes, attributes and random states, and puts them back in the end.

    Each thing is put back even where saving or putting back another one fails, as it may where memory runs out.

    Args:
        model: The model.
        parameters: The coordinates x.
        state: What moves in the model beside them.
        start: What evaluations start from; None takes the present.
        widen_half: Whether float16 and bfloat16 parameters and buffers are float32 meanwhile.

    Raises:
        NotPutBack: If something cannot be put back.
    """
    with ExitStack() as undo:
        # The last one that is saved is the first one that is put back.
        undo.callback(put_back, RandomState.capture(devices_of(parameters)).restore, "the states of random numbers")
        reshard(model)
        coordinates = {id(p) for p in parameters}
        now = state.snapshot(coordinates)
        if start is not None:
            now.cover(start)
        undo.callback(_notice, state, coordinates, now)
        undo.callback(put_back, now.put_back, "buffers and modules")
        state.mark(coordinates)
        undo.callback(put_back, partial(vectors.assign_, parameters, vectors.clone(parameters)), "parameters")
        holders: list[Tensor] = list(dict.fromkeys([*parameters, *model.parameters()]))
        # Gradients that are views into a bucket (DDP) are overwritten by the next backward.
        gradients: Gradients = [(p, p.grad, _copy_of_view(p.grad)) for p in holders]
        undo.callback(put_back, partial(_put_gradients, gradients), "gradients")
        half = [t for t in dict.fromkeys([*holders, *model.buffers()]) if widen_half and vectors.is_half(t)]
        outside = {t.dtype for t in half if isinstance(t, nn.Parameter) and id(t) not in coordinates}
        for tensor in half:
            undo.callback(put_back, partial(narrow, tensor, tensor.data), f"the {tensor.dtype} of parameters")
            tensor.data = tensor.data.float()
        isolated = Isolated(start or now, holders, bool(half), widened_dtypes=outside)
        undo.callback(put_back, partial(_put_strays, isolated.strays), "gradients outside of the model")
        undo.callback(put_back, partial(reshard, model), "shards")
        yield isolated


def _notice(state: ModuleState, coordinates: set[int], now: Snapshot) -> None:
    """Finds out what moved for the first time, and says so if it could not be put back."""
    if not all(map(now.holds, state.notice(coordinates))):
        warnings.warn(
            "loss_fn changed parameters that the optimizer does not hold, at this measurement for the first time, so "
            "this once they could not be put back: the run is not what it would have been without the probe. From now "
            "on they are.",
            SmoothdiagWarning,
        )
    state.is_known = True


def _copy_of_view(gradient: Tensor | None) -> Tensor | None:
    return gradient.clone() if gradient is not None and gradient._is_view() else None


def _put_gradients(gradients: Gradients) -> None:
    for parameter, gradient, copy in gradients:
        parameter.grad = gradient
        if gradient is not None and copy is not None:
            gradient.copy_(copy)


def _put_strays(strays: dict[Tensor, Tensor | None]) -> None:
    for leaf, gradient in strays.items():
        leaf.grad = gradient


def narrow(tensor: Tensor, data: Tensor) -> None:
    """Gives a tensor back the data that it had before it was widened."""
    tensor.grad = None
    tensor.data = data

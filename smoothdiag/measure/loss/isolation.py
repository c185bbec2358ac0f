"""Isolation: saves everything in a run that evaluating a loss may touch, and puts it back afterwards."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from smoothdiag import vectors
from smoothdiag.measure.loss.batches import RandomState, devices_of
from smoothdiag.measure.loss.coordinates import reshard
from smoothdiag.measure.loss.faults import put_back
from smoothdiag.measure.loss.state import ModuleState, Snapshot, parameters_of
from smoothdiag.packing import Kept
from smoothdiag.rows import SmoothdiagWarning

Gradients = list[tuple[Tensor, Tensor | None, Tensor | None]]


@dataclass
class Isolated:
    """A model while its loss is evaluated.

    Attributes:
        start: State of the model besides x that every evaluation starts from.
        parameters: x as it was.
        holders: Tensors that ``backward`` may give a gradient: x, and parameters that do not move.
        is_widened: Whether some narrower parameters or buffers are float32 during the measurement.
        strays: Gradients that tensors outside the model had before.
        widened_dtypes: The training dtypes of parameters outside x that are float32 during the measurement.
    """

    start: Snapshot
    parameters: Kept
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
    keep: Callable[[], Kept],
    *,
    widen_half: bool,
) -> Iterator[Isolated]:
    """Saves parameters, buffers, gradients, modes, attributes and random states, and puts them back at the end.

    Each of them is put back even if saving or restoring another one fails, for example because memory runs out.

    Args:
        model: The model.
        parameters: The coordinates x.
        state: Knows what else moves in the model.
        start: State that evaluations start from; None takes the present state.
        keep: Returns what to put the parameters back from.
        widen_half: Whether float16 and bfloat16 parameters and buffers are float32 inside the block.

    Raises:
        NotPutBack: If something cannot be put back.
    """
    with ExitStack() as undo:
        # What is saved last is put back first.
        undo.callback(put_back, RandomState.capture(devices_of(parameters)).restore, "the random states")
        reshard(model)
        coordinates = {id(p) for p in parameters}
        now = state.snapshot(coordinates)
        if start is not None:
            now.cover(start)
        undo.callback(_notice, state, coordinates, now)
        undo.callback(put_back, now.put_back, "buffers and modules")
        state.mark(coordinates)
        kept = keep()
        undo.callback(put_back, partial(kept.restore, parameters), "parameters")
        holders: list[Tensor] = vectors.unique(parameters, parameters_of(model))
        # Gradients that are views into a bucket (DDP) are overwritten by the next backward.
        gradients: Gradients = [(p, p.grad, _copy_of_view(p.grad)) for p in holders]
        undo.callback(put_back, partial(_put_gradients, gradients), "gradients")
        half = [t for t in vectors.unique(holders, model.buffers()) if widen_half and vectors.is_half(t)]
        outside = {t.dtype for t in half if isinstance(t, nn.Parameter) and id(t) not in coordinates}
        for tensor in half:
            undo.callback(put_back, partial(narrow, tensor, tensor.data), f"parameters in {tensor.dtype}")
            tensor.data = tensor.data.float()
        isolated = Isolated(start or now, kept, holders, bool(half), widened_dtypes=outside)
        undo.callback(put_back, partial(_put_strays, isolated.strays), "gradients outside the model")
        undo.callback(put_back, partial(reshard, model), "shards")
        yield isolated


def _notice(state: ModuleState, coordinates: set[int], now: Snapshot) -> None:
    """Finds parameters that loss_fn moved for the first time, and warns if they could not be put back."""
    if not all(map(now.holds, state.notice(coordinates))):
        warnings.warn(
            "loss_fn changed parameters that the optimizer does not hold. The probe saw this for the first time and "
            "could not undo it, so the run now differs from a run without the probe. Later measurements will put "
            "these parameters back. To keep the run unchanged, change them in the loop and not in loss_fn.",
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
    """Gives a tensor the data back that it had before widening."""
    tensor.grad = None
    tensor.data = data

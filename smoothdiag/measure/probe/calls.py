"""Calls: shows a probe the calls of a model that returns its loss, and learns how each loss counts in a step."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smoothdiag.adapters.scalers import scale_of_step
from smoothdiag.measure.loss.batches import MicroBatch
from smoothdiag.measure.loss.calls import Call, loss_in, needed, no_loss
from smoothdiag.measure.loss.factors import Factor
from smoothdiag.measure.loss.objective import Objective
from smoothdiag.measure.loss.replicas import Replicas
from smoothdiag.measure.probe.sharded import Shards

UNSEEN = (
    "no call of `model(...)` whose loss took part in a backward pass",
    "Let the loop call the module that the probe was made for, by `model(...)`, and call backward on the loss that it "
    "returns. The probe does not see calls of `model.module(...)`, `model.forward(...)` or another wrapper of it, nor "
    "calls within what torch.compile compiles: make the probe for `torch.compile(model)` itself, or after "
    "`model.compile()`. In all other loops pass `loss_fn` to the Probe.",
)
"""What a probe has missed if it has seen no call, and the remedy."""

SUMMED = (
    "The losses of the step's micro-batches count {total:.6g} times in all, and the loop changed the gradients between "
    "backward and the step. If it only clipped them, all is well. If it also divided them, then the gradient norms, L0 "
    "and thresholds of this probe are {total:.6g} times too large: divide the loss instead of the gradients."
)
"""Warning for a loop that may divide gradients before it clips them."""

EQUAL = 1e-5
"""Relative distance of a length, in float32, from the length that rounding explains."""


class Calls:
    """Watches the calls of a model by hooks.

    Copies of the model, as for averaged weights, and saved models do not take the hooks along.

    Args:
        model: The model.
        show: Shows a call to the probe, if a step that is due needs it; returns it if the probe keeps it.
        unharmed: Keeps errors until the step ends.
        has_gradients: Whether the coordinates hold gradients.
        warn: Warns, unless there was a warning of this kind before.
    """

    def __init__(
        self,
        model: nn.Module,
        show: Callable[[Callable[[], Call]], Call | None],
        unharmed: Callable[[], AbstractContextManager[None]],
        has_gradients: Callable[[], bool],
        warn: Callable[[str, str], None],
    ) -> None:
        if isinstance(model, nn.ModuleList | nn.ModuleDict):
            raise needed(f"a {type(model).__name__} cannot be called, so it returns no loss")
        self._model, self._show, self._unharmed = model, show, unharmed
        self._has_gradients, self._shards, self._warn = has_gradients, Shards(model), warn
        self._call: Call | None = None  # the one that is running
        self._is_inside = False
        self._passes: dict[Factor, int] = {}  # the latest backward pass that each factor comes from
        self._number, self._task, self._is_open = 0, -1, False
        self._refusal, self._scale = "", 1.0
        self._handles = [
            # First of all hooks: FSDP2, for one, casts the arguments in a hook of its own.
            model.register_forward_pre_hook(_Hook(self._before), prepend=True, with_kwargs=True),
            model.register_forward_hook(_Hook(self._after), with_kwargs=True),
        ]
        self._compiled = model._compiled_call_impl
        if self._compiled is not None:
            model._compiled_call_impl = self._around

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        outer: Any = self._model._compiled_call_impl
        if outer == self._around:
            self._model._compiled_call_impl = self._compiled
        # A probe that was made later stands around this one.
        while isinstance(calls := getattr(outer, "__self__", None), Calls):
            if calls._compiled == self._around:
                calls._compiled = self._compiled
            outer = calls._compiled

    def begin(self, observed: Sequence[MicroBatch]) -> bool:
        """Returns whether the step that the optimizer now takes has a loss that the model returned.

        Raises:
            ValueError: If the loop trains another loss.
        """
        self._scale = scale_of_step(sys._getframe(1))
        used = [micro.batch.factor for micro in observed if micro.batch.factor.is_known]
        bend = next((factor.bend for factor in used if factor.bend), "")
        if bend:
            raise needed(f"the loop trains no multiple of what the model returned: {bend} lies in between")
        if observed and not used and self._refusal:
            raise needed(self._refusal)
        return bool(used)

    def weighted(self, observed: Sequence[MicroBatch], multiplied: float, replicas: Replicas) -> list[MicroBatch]:
        """Returns the micro-batches whose losses count in the step, with their weights; waits for the device.

        Args:
            observed: All micro-batches that the probe saw.
            multiplied: What the gradients have been multiplied by since backward.
            replicas: The ranks that average their gradients.
        """
        used = [micro for micro in observed if micro.batch.factor.is_known]
        if not used:
            return []  # as on held-out batches
        factors = [micro.batch.factor.value.double().reshape(()) for micro in used]
        found = torch.stack([f.to(factors[0].device) for f in factors]).tolist()
        total = sum(found) / self._scale
        total = replicas.mean(total) if replicas else total
        scale = self._scale
        multiplied *= 1 if multiplied == 1 else scale  # the scaler has divided them
        if abs(total * multiplied - 1) < EQUAL and abs(multiplied - 1) > EQUAL:
            scale /= multiplied  # losses are summed or scaled, and gradients divided to make up for it
        elif total > 2 - EQUAL and abs(multiplied - 1) > EQUAL:
            self._warn(SUMMED.format(total=total), "summed")
        # A loop divides, and multiplying by the reciprocal would differ in the last bit of the loss.
        mean = float(1 / torch.tensor(float(len(used)), dtype=used[0].batch.factor.value.dtype))
        weights = [factor / scale for factor in found]
        return [replace(m, weight=None if w == mean else w) for m, w in zip(used, weights, strict=True)]

    def clear(self) -> None:
        """Forgets the calls of a step."""
        self._call, self._refusal, self._passes = None, "", {}

    def forget_earlier(self) -> None:
        """Forgets the backward passes before the present one, because their gradients have been dropped."""
        present = self._number if self._is_open else self._number + 1
        for factor in [f for f, number in self._passes.items() if number < present]:
            factor.forget()
            del self._passes[factor]

    def _around(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the compiled model; hooks within it would be compiled too, and do nothing."""
        assert self._compiled is not None
        self._before(self._model, args, kwargs)
        self._is_inside = True  # where torch.compile gives up, the hooks run after all
        try:
            found = self._compiled(*args, **kwargs)
        finally:
            self._is_inside = False
        self._after(self._model, args, kwargs, found)
        return found

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Shallow copies of the model, as for threads of DataParallel, have the hooks too.
        if module is not self._model or self._is_inside:
            return
        self._call = None
        is_recomputed = torch._C._current_graph_task_id() != -1  # by a checkpoint around the model
        if torch.is_grad_enabled() and not (Objective.num_isolated or is_recomputed or torch._C._get_tracing_state()):
            self._call = self._show(lambda: _call(args, kwargs))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> None:
        call = self._call
        if module is not self._model or self._is_inside or call is None:
            return
        self._call = None
        with self._unharmed():
            loss = loss_in(found)
            if loss is None:
                self._refusal = no_loss(found)
            else:
                call.factor.watch(loss, lambda: self._on_backward(call.factor))

    def _on_backward(self, factor: Factor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task or not self._is_open:
            self._number, self._task, self._is_open = self._number + 1, task, True
            # Checkpoints run passes of their own within this one, so the end tells it from the next one.
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
            # Sharded gradients are held elsewhere until they are reduced.
            if not self._has_gradients() and not self._shards.pending():
                self.forget_earlier()
        self._passes[factor] = self._number

    def _end(self) -> None:
        self._is_open = False


class _Hook:
    """A hook that stays with its module: copies of the module get a function that does nothing in its place."""

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = act

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._act(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        # A saved model can be loaded where this library is not installed.
        return getattr, (nullcontext(), "__exit__")


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    active = DistributedDataParallel._active_ddp_module
    if active is not None:
        raise ValueError(
            "Parameter `model` should be the DistributedDataParallel module that the loop calls, because only that one "
            f"knows of the other ranks. Found the {type(active.module).__name__} within it."
        )
    return Call.of(args, kwargs)

"""Probe: watches a training loop and measures at chosen optimizer steps."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import torch
from torch import nn

from smoothdiag import vectors
from smoothdiag.measure.coordinates import common, coordinates, learning_rates, parameter_groups
from smoothdiag.measure.estimators import Estimate, Estimator, LocalSmoothness, PathSmoothness, Status, Step
from smoothdiag.measure.objective import LossFn, MicroBatch, Objective, RandomState, Reduction
from smoothdiag.measure.schedule import Schedule, every
from smoothdiag.trace import SmoothdiagWarning, Trace
from smoothdiag.vectors import Vector

T = TypeVar("T")

ROUNDING = {torch.float64: 2e-15, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Relative rounding error of one gradient by parameter dtype, rounded up from what small LSTMs, attention and
convolutional networks show against the next wider dtype (benchmarks/gradient_rounding.py; float64 and float16
scaled from float32 and bfloat16 by their unit roundoff)."""


class Probe:
    """Measures local smoothness beside the gradient norm, without changing the run by one bit.

    The probe takes hold of the optimizer by its step hooks. On the steps that ``schedule`` names it keeps the
    batches, the random states they were met with and the parameters before and after the step; then it
    evaluates the loss again on the same data, and puts everything back.

    Args:
        model: The model being trained.
        optimizer: Its optimizer; the coordinates x are the trainable parameters that it holds.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar loss of one micro-batch, as the loop computes it.
        estimators: What to measure at each due step.
        schedule: Which optimizer steps to measure.
        probe_batches: Held-out batches to measure on instead of the step's own.
        trace: A Trace, or a path to write one to; default: rows in memory.
        group_by: Parameter name -> label of its group; each group gets rows of its own beside "all".
        reduction: How the micro-batch losses of one step add up in the loop: ``"mean"`` or ``"sum"``.
        seed: Seed of the random states that held-out batches are evaluated with.

    Raises:
        ValueError: If the model has no trainable parameters, the optimizer holds none of them, or an argument
            is out of its range.

    Attributes:
        trace: What was recorded.
        steps: Optimizer steps seen so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        *,
        estimators: Sequence[Estimator] = (PathSmoothness(), LocalSmoothness()),
        schedule: Schedule | None = None,
        probe_batches: Sequence[Any] | None = None,
        trace: Trace | str | Path | None = None,
        group_by: Callable[[str], str] | None = None,
        reduction: Reduction = "mean",
        seed: int = 0,
    ) -> None:
        if reduction not in get_args(Reduction):
            raise ValueError(
                f"Parameter `reduction` should be one of {get_args(Reduction)}. Found `reduction = {reduction!r}`."
            )
        if not callable(loss_fn):
            raise ValueError(f"Parameter `loss_fn` should be callable. Found `loss_fn = {loss_fn!r}`.")
        if not estimators:
            raise ValueError("Parameter `estimators` should hold at least one estimator. Found none.")
        self._parameters = coordinates(model, optimizer)
        self._groups = parameter_groups(model, self._parameters, group_by)
        self._model, self._optimizer, self._loss_fn = model, optimizer, loss_fn
        self._estimators, self._reduction = tuple(estimators), reduction
        self._schedule = every(20) if schedule is None else schedule
        self._devices = sorted({p.device for p in self._parameters if p.device.type != "cpu"}, key=str)
        self._held_out = None if probe_batches is None else self._prepare_held_out(probe_batches, seed)
        self._owns_trace = not isinstance(trace, Trace)
        self.trace = trace if isinstance(trace, Trace) else Trace(trace)
        self.steps = 0
        self._due = self._schedule(0)
        self._micro_batches: list[MicroBatch] = []
        self._buffers: Vector | None = None
        self._start: Vector | None = None
        self._lrs: list[float] = []
        self._depth = 0
        self._gradient_error: float | None = None
        self._warned_unobserved = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def watch(self, loader: Iterable[T]) -> "Watched[T]":
        """Returns an iterator over ``loader`` that shows every batch to the probe; ``len`` works if it did."""
        return Watched(self, loader)

    def observe(self, batch: Any) -> None:
        """Shows the probe one micro-batch, right before its forward pass.

        Args:
            batch: What ``loss_fn`` takes. It is kept by reference until the optimizer steps.
        """
        self._depth = 0  # a step that raised an error never reached its post-hook
        if not self._due:
            return
        if self._buffers is None:
            self._buffers = vectors.clone(list(self._model.buffers()))
        if self._held_out is None:
            self._micro_batches.append(MicroBatch(batch, RandomState.capture(self._devices)))

    def close(self) -> None:
        """Detaches from the optimizer; closes the trace's file if the probe opened it."""
        for handle in self._handles:
            handle.remove()
        self._forget_step()
        if self._owns_trace:
            self.trace.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to go on measuring at the same steps."""
        return {"steps": self.steps, "gradient_error": self._gradient_error}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, as returned by ``state_dict``."""
        self.steps = int(state["steps"])
        self._gradient_error = state["gradient_error"]
        self._due = self._schedule(self.steps)

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._depth += 1
        # A subclass whose step calls super().step() fires the hooks twice; the outer pair counts.
        if self._depth > 1 or not self._due:
            return
        if self._held_out is None and not self._micro_batches:
            if not self._warned_unobserved:
                self._warned_unobserved = True
                warnings.warn(
                    "The optimizer stepped but the probe saw no batch: nothing was measured. Iterate over "
                    "probe.watch(loader), or call probe.observe(batch) before each forward pass.",
                    SmoothdiagWarning,
                )
            return
        self._start = vectors.clone(self._parameters)
        self._lrs = learning_rates(optimizer, self._parameters)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        try:
            if self._start is not None:
                self._measure(self._start)
        finally:
            self._forget_step()
            self.steps += 1
            self._due = self._schedule(self.steps)

    def _forget_step(self) -> None:
        self._micro_batches, self._buffers, self._start = [], None, None

    def _measure(self, start: Vector) -> None:
        objective = Objective(
            self._model,
            self._loss_fn,
            self._held_out if self._held_out is not None else self._micro_batches,
            self._parameters,
            buffers=self._buffers,
            reduction=self._reduction,
        )
        end = objective.point()
        first = self._gradient_error is None
        with objective.isolated():
            if self._gradient_error is None:
                # An error here is a mistake in the set-up: let it stop the run while that costs nothing.
                self._gradient_error = _self_test(objective, start)
            step = Step(
                index=self.steps,
                objective=objective,
                start=start,
                end=end,
                lr=common(self._lrs),
                gradient_error=self._gradient_error,
                groups=self._groups,
            )
            for estimator in self._estimators:
                self._record(step, estimator, raise_errors=first)

    def _record(self, step: Step, estimator: Estimator, *, raise_errors: bool) -> None:
        began, num_grads = time.perf_counter(), step.objective.num_grads
        try:
            estimate = estimator(step)
        except Exception as error:
            if raise_errors:
                raise
            # A run of days must not end because one measurement could not be taken.
            warnings.warn(f"Step {step.index} was not measured: {error!r}", SmoothdiagWarning)
            name = type(estimator).__name__
            estimate = Estimate(name, math.nan, math.nan, math.nan, math.nan, status=Status.FAILED)
        blocks = {"all": range(len(self._parameters)), **step.groups}
        for label, part in {"all": estimate, **estimate.groups}.items():
            own = label == "all"
            self.trace.append(
                {
                    "step": step.index,
                    "group": label,
                    "estimator": part.estimator,
                    "grad_norm": part.grad_norm,
                    "smoothness": part.smoothness,
                    "step_norm": part.step_norm,
                    "param_norm": float(vectors.norm([step.start[i] for i in blocks[label]])),
                    "loss": part.loss,
                    "lr": common([self._lrs[i] for i in blocks[label]]),
                    "saturation": part.saturation,
                    "noise_floor": part.noise_floor,
                    "status": part.status.name.lower(),
                    "data": "step" if self._held_out is None else "held-out",
                    "num_grads": step.objective.num_grads - num_grads if own else 0,
                    "seconds": time.perf_counter() - began if own else 0.0,
                    "device": str(step.start[0].device),
                    "dtype": str(step.start[0].dtype).removeprefix("torch."),
                }
            )

    def _prepare_held_out(self, batches: Sequence[Any], seed: int) -> list[MicroBatch]:
        if len(batches) == 0:
            raise ValueError("Parameter `probe_batches` should hold at least one batch. Found none.")
        before = RandomState.capture(self._devices)
        RandomState.seed(seed)
        fixed = RandomState.capture(self._devices)
        before.restore()
        return [MicroBatch(batch, fixed) for batch in batches]


class Watched(Iterator[T], Generic[T]):
    """An iterator over a loader that shows every batch to a probe; may be iterated once an epoch."""

    def __init__(self, probe: Probe, loader: Iterable[T]) -> None:
        self._probe, self._loader = probe, loader
        self._iterator: Iterator[T] | None = None

    def __iter__(self) -> "Watched[T]":
        self._iterator = iter(self._loader)
        return self

    def __next__(self) -> T:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        batch = next(self._iterator)
        self._probe.observe(batch)
        return batch

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]


def _self_test(objective: Objective, point: Vector) -> float:
    """Returns the relative error of one gradient: what rounding costs, or two evaluations differ by."""
    once, again = objective.evaluate(point).gradient, objective.evaluate(point).gradient
    # The coarsest dtype decides: its rounding is the largest.
    rounding = max(ROUNDING.get(x.dtype, ROUNDING[torch.bfloat16]) for x in point)
    length, difference = float(vectors.norm(once)), float(vectors.norm(vectors.sub(once, again)))
    # The difference of two gradients holds the error of both.
    repeat = difference / math.sqrt(2) / length if length and math.isfinite(difference) else 0.0
    if repeat > 100 * rounding:  # beyond what the order of additions on a GPU explains
        warnings.warn(
            f"Two gradients of the same loss on the same data differ by {difference / length:.1e} of their length, "
            "so rows may fall below the noise floor. Usual causes: loss_fn draws random numbers from a generator of "
            "its own, reads the next batch, or depends on state that changes from call to call.",
            SmoothdiagWarning,
        )
    return max(rounding, repeat)

"""Replays: collects the evidence about a spike by evaluating the loss again, without a trace in the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from smoothdiag import vectors
from smoothdiag.adapters import StabilityLimit, adapter_of
from smoothdiag.autoclip.benefit import benefit
from smoothdiag.measure.estimators import CriticalStep, Sharpness, Step
from smoothdiag.measure.loss.batches import MicroBatch, tensors_of
from smoothdiag.measure.loss.objective import Evaluation
from smoothdiag.measure.probe import Probe
from smoothdiag.spikes.events import OF_MODULE, SpikeEvent
from smoothdiag.spikes.evidence import Evidence, ratio
from smoothdiag.spikes.recent import Past, Recent
from smoothdiag.spikes.signals import named
from smoothdiag.vectors import Vector

HALF = (torch.float16, torch.bfloat16)

SHARPNESS = Sharpness(tol=0.05, max_products=20)
"""The curvature before a spike is compared with a limit, so one digit is enough."""

PRECONDITIONED = "_preconditioned"

ELSEWHERE = "(on another rank)"
"""In place of the name of a module."""


def recorded(event: SpikeEvent, past: Past | None, before: Past | None) -> Evidence:
    """Returns what the records of a run show about a spike, without any replay."""
    return Evidence(
        event,
        rate=math.nan if before is None else before.relative_rate,
        rate_now=math.nan if past is None else past.relative_rate,
        update=ratio(event.before, event.usual, "update_norm"),
        update_now=ratio(event.values, event.usual, "update_norm"),
        gradient_before=ratio(event.before, event.usual, "grad_norm"),
        numbers=() if past is None else past.numbers,
        numbers_before=() if before is None else before.numbers,
    )


def replayed(found: Evidence, probe: Probe, recent: Recent, past: Past, point: Vector | None) -> Evidence:
    """Returns the evidence with what replays show.

    Args:
        found: What the records show.
        probe: Evaluates the loss.
        recent: The last steps.
        past: The step of the spike.
        point: The weights before it; ``None`` if they are the present ones, as before the optimizer steps.
    """
    objective = probe.replay(past.micro_batches)
    batch = [tensor for micro in past.micro_batches for tensor in tensors_of(micro.batch)]
    here = objective.evaluate(point)
    length = _length(here)
    is_finite = math.isfinite(here.loss) and math.isfinite(length)
    found = replace(
        found,
        is_replayed=True,
        loss=here.loss,
        grad_norm=length,
        bad_inputs=probe.on_any_rank(not all(map(_is_finite, batch))),
        parts=_parts(probe, here.gradient) if is_finite else {},
        first_module="" if is_finite else _first_module(probe, lambda: objective.value(point)),
    )
    found = _precisely(found, probe, past, point)
    if point is None:  # the optimizer's memory is that of the present
        found = replace(found, staleness_now=_staleness(probe, length))
    candidates = [other for other in recent.references(past.step) if not probe.on_any_rank(not other.can_repeat)]
    others = [(other, probe.replay(other.micro_batches).evaluate(point)) for other in candidates]
    module, of_module = _loudest(probe, found.event)
    found = replace(
        found,
        references=tuple(_length(evaluation) for _, evaluation in others),
        reference_losses=tuple(evaluation.loss for _, evaluation in others),
        module=module,
        module_norm=of_module(here.gradient),
        module_references=tuple(of_module(evaluation.gradient) for _, evaluation in others),
    )
    before = recent.at(past.step - 1)
    for other, evaluation in others:
        if other is before:
            found = replace(found, own=_length(evaluation), own_loss=evaluation.loss)
    if before is not None and any(other is before for other in candidates) and before.point is not None:
        return _step_before(found, probe, before, point)
    return found


def _step_before(found: Evidence, probe: Probe, before: Past, point: Vector | None) -> Evidence:
    """Returns the evidence with what led to the weights of the spike."""
    objective, adapter = probe.replay(before.micro_batches, widen_half=True), adapter_of(probe.optimizer)
    parameters = probe.parameters
    assert before.point is not None
    with objective.isolated():
        step = Step(
            index=before.step,
            objective=objective,
            start=before.point,
            end=objective.end if point is None else point,
            lr=before.rate,
            gradient_error=1e-6,
            # The optimizer's state is that of the present, so only of the last step.
            preconditioner=adapter.preconditioner(parameters) if point is None else None,
            stability_limit=StabilityLimit(*adapter.stability_limit(parameters)),
        )
        moved = vectors.sub(step.end, step.start)
        slope = float(vectors.dot(step.at_start.gradient, moved))
        critical = CriticalStep()(step).extra["critical_multiple"]
        staleness = _staleness(probe, _length(step.at_start)) if point is None else math.nan
        sharpness = _sharpness(step)
    return replace(found, slope=slope, critical=float(critical), staleness=staleness, sharpness=sharpness)


def benefits(
    found: Evidence,
    probe: Probe,
    recent: Recent,
    past: Past,
    end: Vector | None,
    share: float,
    held_out: Sequence[MicroBatch],
) -> Evidence:
    """Returns the evidence with what a shorter step would have been worth, by forward passes alone.

    Args:
        found: What is known.
        probe: Evaluates the loss.
        recent: The last steps.
        past: The step of the spike, which the optimizer has taken; its parameters are kept.
        end: Where it led; ``None`` if that is where the parameters are.
        share: Length of the shorter step, as a share of the step taken.
        held_out: Held-out micro-batches to judge on, besides; perhaps none.
    """
    assert past.point is not None
    known = []
    for other in (past, recent.at(past.step - 1)):
        is_lost = probe.on_any_rank(other is None or not other.can_repeat)
        known.append(() if is_lost or other is None else other.micro_batches)
    gains = [benefit(probe.replay(data), past.point, end, share) if data else math.nan for data in (*known, held_out)]
    return replace(found, clip_benefit=gains[0], clip_benefit_before=gains[1], clip_benefit_held_out=gains[2])


def _sharpness(step: Step) -> float:
    """Returns the largest eigenvalue at the start of a step over the limit of stability; NaN if that is not known."""
    limit = step.stability_limit
    if not 0 < limit.curvature < math.inf or (limit.preconditioned and step.preconditioner is None):
        return math.nan
    found = SHARPNESS(step)
    wanted = [e for e in (found, *found.parts) if e.estimator.endswith(PRECONDITIONED) == limit.preconditioned]
    # Away from full batches, the limit of small ones is lower: where the two differ, the truth lies in between.
    return wanted[0].smoothness / limit.curvature if wanted and wanted[0].status.usable else math.nan


def _staleness(probe: Probe, length: float) -> float:
    diagonal = adapter_of(probe.optimizer).preconditioner(probe.parameters)
    if diagonal is None:
        return math.nan
    size = float(vectors.norm(diagonal))
    return length / size if size > 0 else math.nan


def _precisely(found: Evidence, probe: Probe, past: Past, point: Vector | None) -> Evidence:
    """Returns the evidence with loss and gradient in float32, if a narrower dtype is in use."""
    wide = InFloat32()
    try:
        with wide:
            there = probe.replay(past.micro_batches, widen_half=True).evaluate(point)
    except RuntimeError:  # kernels of its own may want a narrow dtype
        if probe.is_distributed:
            raise  # so that all ranks hear of it
        return found
    if not (wide.has_met_half or any(p.dtype in HALF for p in probe.model.parameters())):
        return found
    return replace(found, precise_loss=there.loss, precise_grad_norm=_length(there))


class InFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes in float32 where a model, or autocast, asks for float16 or bfloat16.

    Attributes:
        has_met_half: Whether anything asked.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.has_met_half = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation."""
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in HALF:
            kwargs["dtype"], self.has_met_half = torch.float32, True
        return func(*args, **kwargs)


def _first_module(probe: Probe, run: Callable[[], object]) -> str:
    """Returns the name of the first module whose output is not finite; empty if there is none."""
    names: list[str] = []
    with _hooked(probe.model, lambda name, output: names.append(name) if not all(map(_is_finite, output)) else None):
        run()
    found = next((name or type(probe.model).__name__ for name in names), "")
    is_any = probe.on_any_rank(bool(found))  # all ranks have to ask
    return found or (ELSEWHERE if is_any else "")


@contextmanager
def _hooked(model: nn.Module, see: Callable[[str, Sequence[Tensor]], None]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: see(name, list(tensors_of(output))))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _length(found: Evaluation) -> float:
    return float(vectors.norm(found.gradient))


def _loudest(probe: Probe, event: SpikeEvent) -> tuple[str, Callable[[Vector], float]]:
    """Returns the signal of the module that spikes most, and what gives its norm in a gradient; NaN if none spikes."""
    signal = next(iter(event.loudest(1)), "")
    module = signal.removeprefix(OF_MODULE)
    places = [
        i
        for name, found in probe.modules(lambda name: name).items()
        for i in found
        if signal and f"{named(name)}.".startswith(f"{module}.")
    ]
    return signal, lambda gradient: float(vectors.norm([gradient[i] for i in places])) if places else math.nan


def _parts(probe: Probe, gradient: Vector) -> dict[str, float]:
    """Returns the share of each module in the squared norm of a gradient."""
    squares = vectors.norms(gradient).square().tolist()
    total = sum(squares)
    if not 0 < total < math.inf:
        return {}
    return {name: sum(squares[i] for i in places) / total for name, places in probe.modules().items()}

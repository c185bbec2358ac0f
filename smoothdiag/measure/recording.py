"""Recording: turns one estimate into rows of a trace."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from smoothdiag.adapters import adapter_of, name_of
from smoothdiag.adapters.protocol import Adapter
from smoothdiag.measure.estimators import Estimate, Status, Step
from smoothdiag.measure.loss.coordinates import common


def rows_of(
    step: Step,
    estimate: Estimate,
    lrs: Sequence[float],
    *,
    data: str,
    override: Status | None,
    cost: Mapping[str, float],
) -> Iterator[dict[str, Any]]:
    """Yields one row for the estimate and one for each of its parts.

    Args:
        step: The step that was measured.
        estimate: What the estimator returned.
        lrs: Learning rate of each parameter.
        data: "step", "fixed" or "held-out".
        override: Doubt about the whole measurement. It replaces a usable status; an unusable one replaces any status.
        cost: Columns of the cost, which only the first row gets.
    """
    for part in (estimate, *estimate.parts):
        status = part.status
        if override is not None and (status.usable or not override.usable):
            status = override
        yield {
            "step": step.index,
            "group": part.group,
            "estimator": part.estimator,
            "grad_norm": part.grad_norm,
            "smoothness": part.smoothness,
            "step_norm": part.step_norm,
            "param_norm": step.norm_of_start(part.group),
            "loss": part.loss,
            "lr": common([lrs[i] for i in step.block(part.group)]),
            "saturation": part.saturation,
            "noise_floor": part.noise_floor,
            "two_scale": part.two_scale,
            "status": status.name.lower(),
            "data": data,
            "device": str(step.start[0].device),
            "dtype": str(step.start[0].dtype).removeprefix("torch."),
            **part.extra,
            **(cost if part is estimate else {}),
        }


def facts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the facts about a run for the header of a trace."""
    adapter = adapter_of(optimizer)
    return {
        "optimizer": name_of(optimizer),
        "follows_gradients": adapter.follows_gradients,
        **(_averaging(adapter, optimizer) if adapter.follows_gradients else {}),
        "model": type(model).__name__,
        "torch": torch.__version__,
    }


def _averaging(adapter: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Returns momentum and gain of the optimizer; nothing if its groups differ, or if it holds no numbers."""
    found = {(adapter.momentum(group), adapter.gain(group)) for group in optimizer.param_groups}
    if len(found) != 1:
        return {}
    momentum, gain = found.pop()
    known = isinstance(momentum, float | int) and isinstance(gain, float | int) and math.isfinite(gain)
    return {"momentum": momentum, "gain": gain} if known else {}


def failed_row(step: int, estimator: str, data: str) -> dict[str, Any]:
    """Returns the row of a measurement that ended in an error."""
    unknown = {"grad_norm": math.nan, "smoothness": math.nan, "status": Status.FAILED.name.lower()}
    return {"step": step, "estimator": estimator, "data": data, **unknown}

"""Scalers: the GradScaler that takes a step."""

from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch.amp.grad_scaler import OptState

_STEP = torch.amp.GradScaler.step.__code__


def scale_of_step(frame: FrameType | None) -> float:
    """Returns the factor of the GradScaler in whose ``step`` a frame runs; 1 if there is none. Waits for the device."""
    scaler = _scaler_of(frame)
    factor = scaler._scale if scaler is not None and scaler.is_enabled() else None
    return 1.0 if factor is None else float(factor)


def still_scaled(frame: FrameType | None, optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Returns the optimizers whose gradients the GradScaler in whose ``step`` a frame runs has not unscaled yet."""
    scaler = _scaler_of(frame)
    if scaler is None or not scaler.is_enabled():
        return []
    stages = [scaler._per_optimizer_states[id(optimizer)]["stage"] for optimizer in optimizers]
    return [o for o, stage in zip(optimizers, stages, strict=True) if stage is OptState.READY]


def _scaler_of(frame: FrameType | None) -> Any:
    # An optimizer does not know who calls it, so the frames below the call of its ``step`` are searched.
    while frame is not None:
        if frame.f_code is _STEP:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None

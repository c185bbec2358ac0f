"""Scalers: the GradScaler that takes a step."""

from types import FrameType

import torch

_STEP = torch.amp.GradScaler.step.__code__


def scale_of_step(frame: FrameType | None) -> float:
    """Returns the factor of the GradScaler in whose ``step`` a frame runs; 1 if there is none. Waits for the device.

    An optimizer does not know who calls it, so the frames below the call of its ``step`` are searched.
    """
    while frame is not None:
        if frame.f_code is _STEP:
            scaler = frame.f_locals["self"]
            factor = scaler._scale if scaler.is_enabled() else None
            return 1.0 if factor is None else float(factor)
        frame = frame.f_back
    return 1.0

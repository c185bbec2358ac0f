"""Scaling: shows to an Observer what a GradScaler does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from smoothdiag.doctor.gradients import Owner, mark_scaled
from smoothdiag.doctor.observer import Observer
from smoothdiag.doctor.patches import Patches

Function = Callable[..., Any]


class Scaling:
    """Watches the methods of GradScalers.

    Args:
        observer: Follows the loop.
        patches: The stack that puts the original methods back.
        is_off: Whether to ignore the current call.
        own: Returns the owner that stands for an optimizer, or ``None`` for an optimizer that is not watched.
    """

    def __init__(
        self,
        observer: Observer,
        patches: Patches,
        is_off: Callable[[], bool],
        own: Callable[[Optimizer], Owner | None],
    ) -> None:
        self._observer, self._is_off, self._own = observer, is_off, own
        patches.replace(torch.amp.GradScaler, "scale", self._on_scale)
        patches.replace(torch.amp.GradScaler, "unscale_", self._on_unscale)
        patches.replace(torch.amp.GradScaler, "get_scale", self._on_get_scale)
        patches.replace(torch.amp.GradScaler, "step", self._on_step)

    def _on_scale(self, original: Function) -> Function:
        def scale(scaler: Any, *args: Any, **kwargs: Any) -> Any:
            scaled = original(scaler, *args, **kwargs)
            if self._is_off() or not scaler.is_enabled():
                return scaled
            self._observer.uses_scaler = True
            return mark_scaled(scaled)

        return scale

    def _on_unscale(self, original: Function) -> Function:
        def unscale_(scaler: Any, optimizer: Optimizer) -> Any:
            if not self._is_off() and scaler.is_enabled():
                owner = self._own(optimizer)
                if owner is not None:
                    owner.scaled = False
            return original(scaler, optimizer)

        return unscale_

    def _on_get_scale(self, original: Function) -> Function:
        def get_scale(scaler: Any) -> Any:
            self._observer.has_read_scale = True  # the loop may be about to divide by the factor
            return original(scaler)

        return get_scale

    def _on_step(self, original: Function) -> Function:
        def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._is_off() and isinstance(optimizer, Optimizer):
                owner = self._own(optimizer)
                if owner is not None:
                    self._observer.before_scaled_step(owner)
            return original(scaler, optimizer, *args, **kwargs)

        return step

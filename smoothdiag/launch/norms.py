"""Norms: how large the gradients of a run are before anything clips them, and how often its clips act."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from smoothdiag import vectors
from smoothdiag.adapters.wrappers import pending_scale
from smoothdiag.doctor.patches import Patches
from smoothdiag.doctor.sites import Site, call_site, caller, is_own

Function = Callable[..., Any]
_ROUNDING: Final = 1.01
"""How much longer a gradient may be after the clip than before it, for norms in half precision."""


@dataclass
class Clips:
    """The clips of one line; the numbers stay on their device until somebody asks.

    Attributes:
        site: The line.
        thresholds: Threshold of each clip [f/x].
        norms: Norm of the gradients that each was given, before it clipped [f/x].
    """

    site: Site
    thresholds: list[float] = field(default_factory=list)
    norms: list[Tensor | float] = field(default_factory=list)

    @property
    def threshold(self) -> float:
        """The last threshold; NaN without one."""
        return self.thresholds[-1] if self.thresholds else math.nan

    @property
    def clipped(self) -> int:
        """How many clips shortened the gradient."""
        return sum(float(n) > t for n, t in zip(self.norms, self.thresholds, strict=True))


class Norms:
    """Follows the clips of a run, and the gradients that its optimizers step with.

    Args:
        patches: The stack that puts the original functions back.
        is_watched: Whether the steps of an optimizer count.

    Attributes:
        clips: The clips by the norm, by line.
    """

    def __init__(self, patches: Patches, is_watched: Callable[[Optimizer], bool]) -> None:
        self.clips: dict[Site, Clips] = {}
        self._is_watched = is_watched
        self._steps: list[Tensor | float] = []
        self._parts: dict[int, Tensor] = {}  # of the optimizers that have stepped since the first of them did
        self._whole: Tensor | float | None = None
        self._clipped: Tensor | float | None = None
        # A parameter of the last step, its gradient then, and how often that had been written to.
        self._used: tuple[weakref.ref[Tensor], weakref.ref[Tensor], int] | None = None
        self._is_busy = False
        for function in (nn.utils.clip_grad_norm_, nn.utils.clip_grads_with_norm_):
            patches.redirect(function, self._on_clip)
        patches.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        patches.callback(register_optimizer_step_post_hook(self._after_step).remove)

    def of_steps(self) -> list[float]:
        """Returns the gradient norm of each step, before clipping, where it is known; waits for the device."""
        self._end_step()
        return [float(norm) for norm in self._steps]

    def _on_clip(self, original: Function) -> Function:
        by_norm = original.__name__ == "clip_grad_norm_"

        def clip(*args: Any, **kwargs: Any) -> Any:
            if self._is_busy or torch.compiler.is_compiling() or is_own(frame := caller(sys._getframe(1))):
                return original(*args, **kwargs)
            is_late = self._is_used_up()
            self._is_busy = True
            try:
                result = original(*args, **kwargs)
            finally:
                self._is_busy = False
            given = dict(zip(("parameters", "max_norm", "total_norm"), args, strict=False)) | kwargs
            norm = result if by_norm else given.get("total_norm")
            if norm is not None:
                self._take(call_site(frame), float(given["max_norm"]), norm, is_late=is_late)
            return result

        return clip

    def _take(self, site: Site, threshold: float, norm: Any, *, is_late: bool) -> None:
        norm = norm.detach().clone() if isinstance(norm, Tensor) else norm
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if 0 < threshold < math.inf:
            clips = self.clips.setdefault(site, Clips(site))
            clips.thresholds.append(threshold)
            clips.norms.append(norm)
        if self._clipped is None and not is_late:
            self._clipped = norm

    def _is_used_up(self) -> bool:
        """Whether the gradients are still those of the last step, so that a clip says nothing of the next one."""
        parameter, gradient, version = self._used or (lambda: None, lambda: None, -1)
        held = parameter()
        return held is not None and held.grad is not None and held.grad is gradient() and held.grad._version == version

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(map(callable, (*args[1:], *kwargs.values()))):
            self._clipped = None  # a closure is going to make the gradients
        else:
            self._add(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(map(callable, (*args[1:], *kwargs.values()))):
            self._add(optimizer)

    def _add(self, optimizer: Optimizer) -> None:
        clipped, self._clipped = self._clipped, None
        if not self._is_watched(optimizer) or pending_scale(optimizer) is not None:
            return  # gradients still carry the factor of a GradScaler
        if id(optimizer) in self._parts:
            self._end_step()
        with_gradient = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        held = [p.grad for p in with_gradient]
        if held:
            self._used = weakref.ref(with_gradient[0]), weakref.ref(held[0]), held[0]._version
        if clipped is not None:
            self._whole = clipped  # what was clipped counts as the whole gradient
        elif not held or any(g.is_sparse or vectors.is_sharded(g) for g in held):
            return
        self._parts[id(optimizer)] = vectors.norm([g.detach() for g in held]) if held else torch.zeros(())

    def _end_step(self) -> None:
        """Adds the norm of the gradients of all optimizers that have taken one step together."""
        parts, whole = list(self._parts.values()), self._whole
        self._parts, self._whole = {}, None
        stepped = torch.stack([part.to(parts[0].device) for part in parts]).norm() if parts else None
        if stepped is None or whole is None:
            self._steps += [norm for norm in (whole, stepped) if norm is not None]
            return
        # A clip that was given nothing, or one part, has not seen the whole gradient.
        whole = torch.as_tensor(whole, device=stepped.device)
        self._steps.append(torch.where(stepped > _ROUNDING * whole, stepped.to(whole.dtype), whole))

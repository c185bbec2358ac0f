"""AutoClip: the longest step of a run, from what the run itself shows in its first steps."""

from types import ModuleType
from typing import TYPE_CHECKING

from smoothdiag.autoclip.calibration import StepRule
from smoothdiag.autoclip.clipper import AutoClip
from smoothdiag.moved import moved_module

__all__ = ["AutoClip", "StepRule"]


if not TYPE_CHECKING:  # a type checker that saw it would let every misspelt name pass

    def __getattr__(name: str) -> ModuleType:
        return moved_module(f"{__name__}.{name}")

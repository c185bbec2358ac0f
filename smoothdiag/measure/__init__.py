"""Measuring: the loss as a deterministic function, estimators of local smoothness, and the probe."""

from types import ModuleType
from typing import TYPE_CHECKING

from smoothdiag.moved import moved_module

if not TYPE_CHECKING:  # a type checker that saw it would let every misspelt name pass

    def __getattr__(name: str) -> ModuleType:
        return moved_module(f"{__name__}.{name}")

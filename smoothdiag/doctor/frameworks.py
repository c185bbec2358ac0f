"""Frameworks: which of them runs the loop, and where each has its place for clipping."""

from __future__ import annotations

import functools
import re
from types import FrameType
from typing import Any, Final

_KNOWN: Final = frozenset((
    "accelerate", "colossalai", "composer", "deepspeed", "diffusers", "fastai", "ignite", "lightning",
    "lightning_fabric", "peft", "pytorch_lightning", "ray", "sentence_transformers", "skorch", "stable_baselines3",
    "timm", "transformers", "trl", "unsloth",
))  # fmt: skip
"""Packages whose code is a library's wherever it lies, as after ``pip install -e``."""
_TRAINERS: Final = {
    "lightning.pytorch": "lightning",
    "pytorch_lightning": "lightning",
    "transformers": "transformers",
    "trl": "transformers",
    "sentence_transformers": "transformers",
}
"""Modules with a loop of their own, and the framework whose settings it has."""
_HELPERS: Final = {"lightning.fabric": "fabric", "lightning_fabric": "fabric", "accelerate": "accelerate"}
"""Modules that loops of users call."""
_INSTALLED: Final = re.compile(
    r"[\\/](site-packages|dist-packages)[\\/]"  # any environment, those of conda and Debian too
    r"|[\\/][^\\/]+\.(egg|whl|zip)[\\/]"
    r"|[\\/]lib(64)?[\\/]python3\.\d+[\\/](?!site-packages|dist-packages)"
    r"|[\\/]python3\d+\.zip[\\/]"
)
_MANUAL: Final = "lightning, by hand"
_PLACES: Final = {
    "lightning": "Delete this line and set gradient_clip_val of the Trainer, or move it into "
    "configure_gradient_clipping() of the module: Lightning calls that once a step, between the last backward pass and "
    "the step.",
    _MANUAL: "Move this line between manual_backward() of the last micro-batch and the optimizer's step(); Lightning "
    "clips nothing by itself in manual optimization.",
    "transformers": "Delete this line and set max_grad_norm of TrainingArguments, or move it into "
    "on_pre_optimizer_step() of a callback: the Trainer calls that once a step, between the last backward pass and the "
    "step.",
    "accelerate": "Call accelerator.clip_grad_norm_() between accelerator.backward() and the optimizer's step(), under "
    "`if accelerator.sync_gradients:`.",
    "fabric": "Call fabric.clip_gradients() between the last fabric.backward() of a step and the optimizer's step().",
}
_NORMS: Final = {
    "lightning": " To read a norm, use on_before_optimizer_step().",
    "transformers": " To read a norm, use on_pre_optimizer_step().",
}


def place(framework: str, *, by_itself: bool = False) -> str:
    """Returns where to clip in a loop of this framework; empty if the framework is not known.

    ``by_itself`` leaves out the loops that users write themselves.
    """
    return "" if by_itself and framework == _MANUAL else _PLACES.get(framework, "")


def place_to_read(framework: str) -> str:
    """Returns where to read a norm in a loop of this framework; empty if the loop is the user's own."""
    return _NORMS.get(framework, "")


@functools.cache
def is_installed(file: str) -> bool:
    """Returns whether a file lies where packages are installed, in any layout."""
    return _INSTALLED.search(file) is not None


def is_framework(module: str) -> bool:
    """Returns whether a module belongs to a known framework."""
    return module.partition(".")[0] in _KNOWN


def around(frame: FrameType | None) -> str:
    """Returns the framework whose loop calls ``frame``, or else one whose helper does; empty if there is none."""
    trainer = beside = ""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if is_framework(module):
            if (name := _named(module, _TRAINERS)) and not (trainer == _MANUAL and name == "lightning"):
                trainer = _MANUAL if name == "lightning" and _is_manual(frame) else name
            beside = beside or _named(module, _HELPERS)
        frame = frame.f_back
    return trainer or beside


def helper(frame: FrameType | None) -> str:
    """Returns the framework whose wrapper of an optimizer ``frame`` runs; empty if it runs none."""
    return "" if frame is None else _named(str(frame.f_globals.get("__name__", "")), _HELPERS)


def _named(module: str, names: dict[str, str]) -> str:
    return next((name for start, name in names.items() if f"{module}.".startswith(f"{start}.")), "")


def _is_manual(frame: FrameType) -> bool:
    """Returns whether the Trainer that a frame of Lightning works for leaves optimization to the module."""
    if "trainer" not in frame.f_code.co_varnames[: frame.f_code.co_argcount]:
        return False
    trainer: Any = frame.f_locals.get("trainer")
    module = getattr(trainer, "lightning_module", None)
    return getattr(module, "automatic_optimization", True) is False

"""Attaching: a probe and an AutoClip in shadow mode, at a loop that knows nothing of them."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from smoothdiag.adapters import moved_by
from smoothdiag.adapters.wrappers import innermost
from smoothdiag.autoclip import AutoClip
from smoothdiag.autoclip.progression import is_in_progression
from smoothdiag.console import one_line
from smoothdiag.doctor.patches import Patches
from smoothdiag.launch.norms import Norms
from smoothdiag.launch.recorder import Recorder
from smoothdiag.launch.tape import Recorded, Tape, Unknown
from smoothdiag.measure.estimators import CriticalStep
from smoothdiag.measure.probe import Probe
from smoothdiag.rows import SmoothdiagWarning

UNSEEN: Final = (
    "The loop called no module that holds the parameters of its optimizer, as far as launch-check sees. It does not "
    "see model.forward(...), torch.func.functional_call, steps that are compiled as a whole, or other processes."
)
WITHOUT_OPTIMIZER: Final = "The script made no optimizer of torch.optim, or one derived from it, in this process."


class Attached:
    """Waits for the first forward pass of a loop, and then attaches to its model and its optimizers.

    Attributes:
        probe: The probe; None before the first forward pass, or if the loop cannot be measured.
        clipper: The AutoClip in shadow mode; None as well.
        norms: The gradient norms of the run.
        refusals: Why something is not measured, in sentences.
        warnings: What probe and AutoClip have warned of.
    """

    def __init__(self, patches: Patches) -> None:
        self.probe: Probe | None = None
        self.clipper: AutoClip | None = None
        self.refusals: list[str] = []
        self.warnings: list[str] = []
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._ids: set[int] = set()
        self._stepped: list[Optimizer] = []
        self._has_tried, self._is_closed = False, False
        self.norms = Norms(patches, self._is_watched)
        self._recorder = Recorder(patches, self._begins)
        patches.replace(Optimizer, "__init__", self._on_new_optimizer)
        patches.callback(register_optimizer_step_pre_hook(self._before_step).remove)

    def close(self) -> None:
        """Reads what is still to be read, and leaves the optimizers as they were."""
        if self.clipper is not None and not self._is_closed:
            _ = self.clipper.longest_step  # reads the last rows
            self.clipper.detach()
        if self.probe is not None and not self._is_closed:
            self.probe.close()
        self._is_closed = True
        if not self._has_tried:
            self.refuse(UNSEEN if self._optimizers else WITHOUT_OPTIMIZER)
        elif self.probe is not None and not len(self.probe.trace) and not self.refusals:
            self.refuse("No step was measured.")

    def refuse(self, reason: str) -> None:
        """Notes, once, why something is not measured."""
        if reason not in self.refusals:
            self.refusals.append(reason)

    def _on_new_optimizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def __init__(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            self._optimizers.append(weakref.ref(optimizer))

        return __init__

    def _is_watched(self, optimizer: Optimizer) -> bool:
        if self.probe is None:
            return bool(self._optimizers)
        return any(id(p) in self._ids for p in moved_by(optimizer))

    def _begins(self, module: nn.Module, tape: Tape, size: int) -> bool:
        """Shows a forward pass to the probe; returns whether to note it."""
        if self._is_closed:
            return False
        try:
            if not self._has_tried:
                self._attach_by(module)
            if self.probe is None or not self.probe.due or not _holds(module, self._ids):
                return False
            self.probe.observe(Recorded.of(tape, size))
            return True
        except Exception as error:  # nobody asked for a probe, so nothing of it may end the run
            self.refuse(f"The loop cannot be measured: {one_line(error)}")
            self.close()
            return False

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._recorder.drop()
        if self._has_tried or self._is_closed:
            return
        known = self._made()
        if len(known) == 1 and known[0] is optimizer and any(map(callable, (*args[1:], *kwargs.values()))):
            self._attempt(known, None)  # the closure is going to run the first forward pass
        elif optimizer in known and optimizer not in self._stepped:
            self._stepped.append(optimizer)

    def _attach_by(self, module: nn.Module) -> None:
        """Attaches to the optimizers that step on one loss, as soon as it is clear which ones do."""
        known, own = self._made(), {id(p) for p in module.parameters() if p.requires_grad}
        if not own & {id(p) for optimizer in known for p in moved_by(optimizer)}:
            return
        if self._stepped:  # those that stepped without a forward pass in between
            self._attempt(self._stepped, module)
        elif len(known) == 1 or all({id(p) for p in _trained(optimizer)} <= own for optimizer in known):
            self._attempt(known, module)

    def _attempt(self, optimizers: Sequence[Optimizer], module: nn.Module | None) -> None:
        self._has_tried = True
        self._ids = {id(p) for optimizer in optimizers for p in moved_by(optimizer)}
        try:
            root = _root(module, {id(p) for optimizer in optimizers for p in _trained(optimizer)})
            chosen: Any = optimizers[0] if len(optimizers) == 1 else list(optimizers)
            self.probe = Probe(
                root,
                chosen,
                self._loss,
                estimators=(CriticalStep(),),
                schedule=is_in_progression,
                data="step",
                reduction="sum",
            )
        except Exception as error:  # nobody asked for a probe, so nothing of it may end the run
            self.refuse(f"The loop cannot be measured: {one_line(error)}")
            return
        self.probe.outlive_errors()
        try:
            self.clipper = AutoClip(chosen, self.probe, mode="shadow")
            self.clipper.outlive_errors()
        except Exception as error:
            self.refuse(f"AutoClip does not fit this optimizer: {one_line(error)}")

    def _made(self) -> list[Optimizer]:
        """Returns the optimizers of the script, the latest for each parameter, and without wrappers."""
        taken, found = set[int](), list[Optimizer]()
        for optimizer in (made for ref in reversed(self._optimizers) if (made := ref()) is not None):
            held = {id(p) for p in _trained(optimizer)}
            if held and not held & taken and innermost(optimizer) is optimizer:
                taken |= held
                found.insert(0, optimizer)
        return found

    def _loss(self, model: nn.Module, recorded: Recorded) -> Tensor:
        try:
            return recorded.loss()
        except Unknown as unknown:
            self.refuse(f"The loss cannot be computed again, because {unknown}.")
            raise


@contextmanager
def attached() -> Iterator[Attached]:
    """Attaches to the loop that runs within the block, and keeps the warnings of probe and AutoClip."""
    with Patches() as patches:
        found = Attached(patches)
        patches.replace(warnings, "warn", partial(_warning_to, found.warnings))
        yield found
        found.close()


def _warning_to(kept: list[str], original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that keeps our warnings: a script may turn warnings into errors, which would end the run."""

    def warn(message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **kwargs: Any) -> None:
        kind = type(message) if isinstance(message, Warning) else category
        if isinstance(kind, type) and issubclass(kind, SmoothdiagWarning):
            kept.append(one_line(message))
        else:
            original(message, category, stacklevel + 1, *args, **kwargs)

    return warn


def _holds(module: nn.Module, ids: set[int]) -> bool:
    return any(id(p) in ids for p in module.parameters())


def _trained(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for p in moved_by(optimizer) if p.requires_grad]


def _root(module: nn.Module | None, needed: set[int]) -> nn.Module | Sequence[nn.Module]:
    """Returns the module that the loop calls if it holds all parameters, or the smallest that does, or several."""
    if module is not None and needed <= {id(p) for p in module.parameters()}:
        return module
    modules = [
        (each, {id(p) for p in each.parameters()} & needed, sum(1 for _ in each.modules())) for each in _modules()
    ]
    # The smallest first; of those that hold the same the outermost, a wrapper, comes first.
    modules.sort(key=lambda found: (sum(1 for _ in found[0].parameters()), -found[2]))
    whole = next((each for each, held, _ in modules if needed <= held), None)
    if whole is not None:
        return whole
    chosen, missing = list[nn.Module](), set(needed)
    while best := max(modules, key=lambda found: (len(found[1] & missing), found[2]), default=None):
        if not best[1] & missing:
            break  # the rest are parameters of the loss itself
        chosen.append(best[0])
        missing -= best[1]
    if not chosen:
        raise ValueError("No module holds the parameters of the optimizer.")
    return chosen if len(chosen) > 1 else chosen[0]


def _modules() -> list[nn.Module]:
    # The type is asked: stand-ins for lazily loaded modules answer isinstance with whatever they stand for.
    return [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]

"""Others: warnings if something else moves the parameters, or if another probe watches the optimizer."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from smoothdiag import vectors
from smoothdiag.adapters import moved_by, name_of
from smoothdiag.adapters.turns import followers
from smoothdiag.adapters.wrappers import wrapped_in

SHOW = "no batch", "Iterate over probe.watch(loader), or call probe.observe(batch) before each forward pass."
"""What a probe has missed in a step without batches, and the remedy."""


def unseen(
    optimizer: torch.optim.Optimizer, probe: object, missed: tuple[str, str] = SHOW, *, has_fixed: bool = False
) -> str:
    """Returns the warning for a step whose batches ``probe`` has not seen.

    Args:
        optimizer: The optimizer that took it.
        probe: The probe.
        missed: What the probe has missed, and the remedy.
        has_fixed: Whether the probe measures the step all the same, on batches that it has kept.
    """
    effect = "so it could not measure"
    if has_fixed:
        effect = (
            "so it measures on the fixed batches alone: nothing compares loss_fn with the training gradient any more, "
            "and what is measured on the step's own batch, as for AutoClip, gets no row"
        )
    what, remedy = missed
    said = f"The optimizer stepped but the probe has seen {what}, {effect}. {remedy}"
    if any(type(owner) is type(probe) and owner is not probe for owner in followers(optimizer)):
        said += (
            " Another probe is attached to this optimizer. If you meant that one, as after running a cell of a "
            "notebook twice, close() this one."
        )
    return said


def moved_by_others(optimizer: torch.optim.Optimizer) -> str:
    """Returns the warning for parameters that moved between two batches without a step of ``optimizer``."""
    inner = list(wrapped_in(optimizer))
    kind = name_of(optimizer)
    remedy = (
        f"Make the probe (and AutoClip) for `optimizer.{inner[0]}`, which it holds"
        if inner
        else "Make the probe for the one that steps"
    )
    return (
        f"The parameters moved between two batches without a call of {kind}.step(), so the probe had to drop the "
        "earlier ones. If the loop has replaced the optimizer, close this probe and make one for the new optimizer, "
        "with `trace=probe.trace`; its `load_state_dict(probe.state_dict())` goes on counting steps. Otherwise "
        "something else moves the parameters: another optimizer, the half steps of sharpness-aware minimisation "
        f"(first_step, second_step), or the loop itself. {remedy}."
    )


class Between:
    """Notices in the first steps whether a backward pass runs between the steps of optimizers that are taken for one.

    Args:
        optimizer: The optimizers.
        is_on: Whether to listen at all.

    Attributes:
        heard: The warning, once there was such a pass.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, is_on: bool) -> None:
        self.heard = ""
        self._optimizer, self._left = optimizer, 3 if is_on else 0
        self._handle: RemovableHandle | None = None

    def listen(self, waiting: Sequence[torch.optim.Optimizer]) -> None:
        """Listens for a backward pass that reaches the parameters of those that have not stepped yet."""
        self.stop()
        held = [p for optimizer in waiting for p in moved_by(optimizer) if p.requires_grad]
        if self._left <= 0 or not held or any(map(vectors.is_sharded, held)):
            return
        self._left -= 1

        def hear(gradient: Tensor) -> None:
            self.heard = (
                f"A backward pass ran between the steps of {name_of(self._optimizer)}, as if each had a loss of its "
                "own. Optimizers in one list take one step on one loss. Make a probe for each of them, "
                "with a loss_fn of its own: what the others move then counts as state of the model."
            )

        self._handle = torch.autograd.graph.register_multi_grad_hook(held, hear, mode="any")

    def stop(self) -> None:
        """Stops listening."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

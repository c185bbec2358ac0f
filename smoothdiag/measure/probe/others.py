"""Others: warnings if something else moves the parameters, or if another probe watches the optimizer."""

import torch

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
    owners = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values()]
    if any(type(owner) is type(probe) and owner is not probe for owner in owners):
        said += (
            " Another probe is attached to this optimizer. If you meant that one, as after running a cell of a "
            "notebook twice, close() this one."
        )
    return said


def moved_by_others(optimizer: torch.optim.Optimizer) -> str:
    """Returns the warning for parameters that moved between two batches without a step of ``optimizer``."""
    inner = list(wrapped_in(optimizer))
    kind = type(optimizer).__name__
    remedy = (
        f"Make the probe (and AutoClip) for `optimizer.{inner[0]}`, which it holds"
        if inner
        else "Make the probe for the one that steps"
    )
    return (
        f"The parameters moved between two batches without a call of {kind}.step(). The probe drops the earlier "
        "batches, because it can no longer measure them where they were met. Something else moves the parameters: "
        "another optimizer, the half steps of sharpness-aware minimisation (first_step, second_step), or the loop "
        f"itself. {remedy}: a probe measures what happens in the step() of its optimizer."
    )

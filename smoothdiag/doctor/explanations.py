"""Explanations: what the documentation says about each fault, for people who have only the package."""

from __future__ import annotations

from typing import Final

_TEXTS: Final = {
    "clip-after-step": """\
The clip runs after `optimizer.step()`. The step has already used the gradients, so the clip shortens numbers that
nobody uses again. Move the clip between `backward()` and `step()`.
""",
    "clip-of-scaled-gradients": """\
Under a `GradScaler`, the gradients that `backward()` leaves are multiplied by the scaler's factor, which is 65536
at first. Only `scaler.unscale_(optimizer)` or `scaler.step` divides by that factor. A clip before that compares
factor times norm with the threshold. Call `scaler.unscale_(optimizer)` before the clip. The doctor reads from the
autograd graph whether `backward()` ran on a scaled loss. The doctor stays silent if you divided the gradients
yourself, or read `scaler.get_scale()` after `backward()`: you may have scaled the threshold instead.
""",
    "clip-of-nothing": """\
The clip had no gradient to clip, so it limited nothing. There are four causes:

- The clip was given a generator of parameters, or a `filter` and the like, that an earlier loop or call had used
  up. A used-up generator is empty. `ps = model.parameters()` serves one loop or call; `list(model.parameters())`
  serves many.
- The clip was given an empty list.
- The clip was given the parameters of another model.
- `zero_grad()` had removed the gradients before the clip. The step then has nothing to use either.

The doctor reports a used-up iterator at once. It reports the other causes if no clip of the line ever found an
entry other than zero and, for at least 30 clips, something shows that there were gradients elsewhere: a backward
pass had given these parameters gradients, which were gone at the clip, or an optimizer stepped with gradients that
nothing had clipped. A network that is frozen, or whose turn comes later, therefore raises no alarm. `watch(model,
optimizer)` ignores clips of parameters that its optimizers do not hold.
""",
    "clip-per-micro-batch": """\
The loop clips, and then another `backward()` adds to the clipped gradient. Every clip shortens the sum so far, so
earlier micro-batches count less than later ones, and gradients that arrive after the last clip are not clipped.
Clip once, before the step. In a loop of Accelerate, put the clip under `if accelerator.sync_gradients:`. The doctor
counts the fault when the optimizer steps: if the loop throws the gradients away instead, nothing is harmed and
nothing is reported.
""",
    "clip-never-binds": """\
None of the 30 or more clips changed a gradient. If none of 30 clips binds, at most one in ten would (95%, rule of
three). A safety net is a good reason for such a line; a setting copied from elsewhere is not. The doctor does not
report a threshold above 1.8e19, because single precision cannot hold its square: such a clip is taken for a way to
read the norm. Nor does the doctor report `clip_grad_value_`, which compares single entries and returns no norm.
""",
    "clip-always-binds": """\
Every one of the 30 or more clips changed the gradient. Every step then has the same gradient length. This is
normalised gradient descent: under plain gradient descent the learning rate alone now sets the length of the steps.
`sd.clip_rule` derives a threshold from a measured fit. A loop without `zero_grad()` ends here too, because its
gradients grow with every step. The finding then says that every backward pass added to gradients that a step had
already used. `clip_grad_value_` is not counted.
""",
    "clip-as-norm": """\
The loop calls `clip_grad_norm_(parameters, inf)` to read the norm. The call also writes: it multiplies every
gradient by `inf / norm`, limited to 1. This factor is 1 as long as the norm is finite. Once the norm is not finite,
the factor is NaN, so one infinite entry in one layer spoils the gradients of all layers.
`torch.nn.utils.get_total_norm` reads the norm and writes nothing. The Trainer of Hugging Face makes this call when
`max_grad_norm` is 0. Set `max_grad_norm=1e30` there: finite gradients stay as they are, and after an infinite norm
all finite entries become 0 instead of NaN.
""",
    "stale-gradients": """\
`optimizer.step(closure)` computes new gradients inside the closure. A clip outside the closure, or in a step
pre-hook, works on the gradients of the step before. A norm that is read above the step belongs to the step before
as well. Move the line into the closure, after its `backward()`. Reading the norm after the step is correct: you see
the gradient of the last evaluation. The doctor ignores closures without a backward pass. It also ignores norms that
you read in a hook which a library calls inside its closure, such as Lightning's `on_before_zero_grad`.
""",
    "scaled-gradients-in-hook": """\
Under a `GradScaler`, a fused optimizer divides by the scaler's factor inside its step. A step pre-hook runs before
that and sees gradients that still carry the factor. The hook runs even when the step is skipped. The doctor reports
a hook if it is yours and a name in its code contains `grad`, `norm` or `clip`. Call `scaler.unscale_(optimizer)`
before `scaler.step(optimizer)`, or divide by `optimizer.grad_scale` in the hook.
""",
    "clip-after-optimizer-in-backward": """\
A hook on the parameters steps the optimizer within `backward()`. When `backward()` returns, the gradients have been
used and are often gone, so a clip comes too late. Clip inside the hook, one parameter at a time; the hook cannot
know the global norm. The doctor also reports a clip of parameters of which only some step in this way.
""",
    "norm-of-one-shard": """\
With FSDP2 and other DTensors, `p.grad.norm().item()` returns the norm of the part on this rank. Every norm of a
`to_local()` part does too, unless the ranks add up their squares. `get_total_norm` and `clip_grad_norm_` return the
global norm of several DTensors. Read the norm of a single DTensor with `.full_tensor()`. A tensor that every rank
holds in full is no shard, and neither is a tensor on a mesh of one rank. The doctor stays silent if the norm, its
square or the sum of squares goes into a collective before the next backward pass.
""",
    "norm-after-clipping": """\
The loop reads the norm after the clip, so the number does not show how large the gradient was. Use the norm that
`clip_grad_norm_` returns, or read the norm before the clip. The doctor stays silent if the norm before the clip was
read too, or if a method of an optimizer reads the norm for its own arithmetic, as in LARS, LAMB and SAM.
""",
}
NAMES: Final = tuple(_TEXTS)
"""Names of the faults."""


def explain(name: str) -> str:
    """Returns what the documentation says about a fault.

    Raises:
        ValueError: If there is no fault of that name.
    """
    if name not in _TEXTS:
        raise ValueError(f"Parameter `name` should be one of {', '.join(NAMES)}. Found `{name}`.")
    return f"{name}\n\n{_TEXTS[name]}"

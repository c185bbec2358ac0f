"""Explanations: what the documentation says about each fault, for whoever has installed the package alone."""

from __future__ import annotations

from typing import Final

_TEXTS: Final = {
    "clip-after-step": """\
The clip comes after `optimizer.step()`: it shortens gradients that nobody uses again. Put it between `backward()`
and `step()`.
""",
    "clip-of-scaled-gradients": """\
Under a `GradScaler` the gradients carry its factor, 65536 at first, until `scaler.unscale_(optimizer)` or
`scaler.step`. A clip before that compares factor times norm with the threshold. Call `scaler.unscale_(optimizer)`
first. Whether the factor is in them is read from the graph of what `backward` is called on. Not named if you
divided the gradients yourself or asked for `scaler.get_scale()` since the backward pass, as one does to scale the
threshold.
""",
    "clip-of-nothing": """\
The clip had no gradient to clip. Four causes: it was given a generator of parameters, or a `filter` and the like,
that had been gone through already, which is empty from then on (`ps = model.parameters()` serves one loop or call;
`list(model.parameters())` serves many); an empty list; parameters of another model; or gradients that `zero_grad()`
had removed before the clip, in which case the step has nothing to use either. Named at once for an iterator at its
end. Otherwise named if none of at least 30 clips of the line had an entry other than zero to work on, and something
shows that there was one elsewhere: a backward pass had given these parameters gradients, which were gone at the
clip, or an optimizer stepped with gradients that nothing had clipped. So a network that is frozen, or whose turn
comes later, raises no alarm. `watch(model, optimizer)` leaves clips of parameters that its optimizers do not hold
to others.
""",
    "clip-per-micro-batch": """\
A clip, then another `backward()` onto the clipped gradient. Every clip shortens the sum so far, so earlier
micro-batches count less than later ones, and what comes after the last clip is not clipped. Clip once, before the
step; in a loop of Accelerate, put the clip under `if accelerator.sync_gradients:`. Counted at the step: gradients
that are thrown away instead harm nothing.
""",
    "clip-never-binds": """\
None of at least 30 clips changed anything. With none of 30, at most one in ten would have (95%, rule of three). A
safety net is a good reason for such a line; a setting copied from elsewhere is not. A threshold above 1.8e19, whose
square single precision cannot hold, is taken for a way to read the norm and not named. Nor is `clip_grad_value_`,
which compares entries and returns no norm.
""",
    "clip-always-binds": """\
All of at least 30 clips did. Every step then has the same gradient length: that is normalised gradient descent, and
under it the learning rate alone sets the length of steps of plain gradient descent. `sd.clip_rule` derives a
threshold from a measured fit. A loop without `zero_grad()` ends here too, because its gradients grow with every
step; the finding then says that every backward pass added to gradients that a step had used already.
`clip_grad_value_` is not counted.
""",
    "clip-as-norm": """\
`clip_grad_norm_(parameters, inf)` is used to read the norm. It multiplies every gradient by `inf / norm` limited to
1, which is 1 as long as the norm is finite, and NaN for all gradients once it is not: one infinite entry in one
layer takes all layers along. `torch.nn.utils.get_total_norm` reads the norm and writes nothing. The Trainer of
Hugging Face does this when `max_grad_norm` is 0; `max_grad_norm=1e30` avoids it: finite gradients stay as they are,
and after an infinite norm all finite entries become 0, not NaN.
""",
    "stale-gradients": """\
`optimizer.step(closure)` computes gradients inside the closure. A clip outside of it, or in a step pre-hook, works
on gradients of the step before, and so does a norm read above the step. Move the line into the closure, after its
`backward()`. A norm that is read after the step is that of the last evaluation, and right. Closures without a
backward pass do not count, nor do norms that you read in a hook which a library calls inside its closure, such as
Lightning's `on_before_zero_grad`.
""",
    "scaled-gradients-in-hook": """\
Fused optimizers take the factor of a `GradScaler` out inside their step, so step pre-hooks see gradients with it,
and run even when the step is skipped. Named when such a hook is yours and a name in it contains `grad`, `norm` or
`clip`. Call `scaler.unscale_(optimizer)` before `scaler.step(optimizer)`, or divide by `optimizer.grad_scale` in
the hook.
""",
    "clip-after-optimizer-in-backward": """\
A hook of the parameters steps within `backward()`. When that returns the gradients are used, and often gone. Clip
inside the hook, one parameter at a time; a global norm cannot be known there. Named too if only some of the
parameters that are clipped step like that.
""",
    "norm-of-one-shard": """\
With FSDP2 and other DTensors, `p.grad.norm().item()` is the norm of the part on this rank, and so is every norm of
`to_local()` parts, unless ranks put their squares together. `get_total_norm` and `clip_grad_norm_` of several
DTensors return the global norm. Read a single one with `.full_tensor()`. A tensor that every rank holds in full,
and a mesh of one rank, are no shards. Not named if the norm, its square or the sum of squares goes into a
collective before the next backward pass.
""",
    "norm-after-clipping": """\
The norm that was read is the one after the clip, however large the gradient was. Use what `clip_grad_norm_`
returns, or read the norm first. Not named if the norm before the clip was read too, or if a method of an optimizer
reads it for its own arithmetic, as LARS, LAMB and SAM do.
""",
}
NAMES: Final = tuple(_TEXTS)
"""What the faults are called."""


def explain(name: str) -> str:
    """Returns what the documentation says about a fault.

    Raises:
        ValueError: If there is no fault of that name.
    """
    if name not in _TEXTS:
        raise ValueError(f"Parameter `name` should be one of {', '.join(NAMES)}. Found `{name}`.")
    return f"{name}\n\n{_TEXTS[name]}"

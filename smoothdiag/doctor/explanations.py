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
The clip had no gradient to clip, so it limited nothing. There are seven causes:

- The clip was given a generator of parameters, or a `filter` and the like, that an earlier loop or call had used
  up. A used-up generator is empty. `ps = model.parameters()` serves one loop or call; `list(model.parameters())`
  serves many.
- The clip was given gradients, `[p.grad for p in ...]`, where it takes the parameters that hold them.
- The clip was given `p.data`, `p.detach()` or the values of a `state_dict()`. They share the memory of the
  parameters and hold no gradients.
- The clip ran before the `backward()` that made the gradients of the step.
- The clip was given an empty list.
- The clip was given the parameters of another model.
- `zero_grad()` had removed the gradients before the clip. The step then has nothing to use either.

The doctor reports the first three causes at once, and the fourth after three steps. It reports the other causes if
no clip of the line ever found an entry other than zero and, for at least 30 clips, something shows that there were
gradients elsewhere: a backward pass had given these parameters gradients, which were gone at the clip, or an
optimizer stepped with gradients that nothing had clipped. A network that is frozen, or whose turn comes later,
therefore raises no alarm. `watch(model, optimizer)` ignores clips of parameters that its optimizers do not hold.
""",
    "clip-of-duplicates": """\
The clip was given some parameters more than once, as with a list of all parameters and those of a part of the
network, or with tied weights of two networks. `clip_grad_norm_` counts a gradient as often as it comes. The norm is
too large, and PyTorch multiplies such a gradient by the factor once for each time. Three entries of which one comes
twice are clipped at another threshold than two, and their direction changes. Give each parameter once:
`list(dict.fromkeys(parameters))`. `clip_grad_value_` does the same to a gradient twice as once, so the doctor does
not count it.
""",
    "clip-of-unused-gradients": """\
The line clipped gradients that no step ever used. There are three causes:

- The clip was given the parameters of another network. In adversarial training, the backward pass of the generator
  also leaves gradients in the critic. A clip of the critic at that point finds gradients to clip, and the generator
  steps unclipped.
- `zero_grad()` stands between the clip and the step. The step then has nothing to use.
- A second `backward()` makes the gradients of the step after `zero_grad()` has thrown away the clipped ones.

The doctor reports a line if this happened three times, if the step that came instead used no clipped gradient, and
if no step ever used a gradient of that line. A step that is left out now and then, because a norm was not finite or
because a `GradScaler` skipped it, therefore raises no alarm.
""",
    "clip-of-a-part": """\
The clip was given some of the gradients that the step used, and no other clip was given the rest. The step can be
as long as the rest makes it. A frequent cause is a list of parameters that was made before a new layer came, or the
parameters of a network where the optimizer also holds those of a loss. The doctor compares the rest with the
threshold of the line. It reports the line if the rest was larger at three steps or more, and if the line never
limited a whole step, alone or together with other lines. If you leave some parameters out on purpose, nothing is
wrong.
""",
    "clip-with-unused-gradients": """\
The clip was given gradients of several optimizers at once, and only one of them stepped; the gradients of the
others were thrown away. They counted in the norm, so the step was shortened by more than its own gradient asks for.
In adversarial training this happens when all parameters are clipped after the backward pass of the generator, which
also leaves gradients in the critic. The doctor reports the line after three such clips if there was never a clip of
this line whose gradients were all used. `clip_grad_value_` looks at entries one by one and is not counted.
""",
    "clip-per-micro-batch": """\
The loop clips, and then another `backward()` adds to the clipped gradient. Every clip shortens the sum so far, so
earlier micro-batches count less than later ones, and gradients that arrive after the last clip are not clipped. The
last `backward()` may run inside the step, as with `optimizer.step(closure)` and in all automatic optimization of
Lightning. A hook that clips each gradient as soon as it is there does the same. Clip once, before the step. In
Lightning that is `gradient_clip_val` of the Trainer or `configure_gradient_clipping()` of the module, in Hugging
Face's Trainer `max_grad_norm`, and in a loop of Accelerate the clip goes under `if accelerator.sync_gradients:`.
The doctor counts the fault when the optimizer steps: if the loop throws the gradients away instead, nothing is
harmed and nothing is reported.
""",
    "threshold-without-meaning": """\
The threshold is negative, zero, infinite or not a number. Often somebody meant "off". PyTorch (measured with 2.13)
checks nothing and computes on:

| threshold | `clip_grad_norm_`, `clip_grads_with_norm_` | `clip_grad_value_` |
|---|---|---|
| negative | multiplies by threshold/norm: the step goes uphill | sets every entry to the threshold |
| 0 | erases the gradient | erases the gradient |
| NaN | makes every entry NaN | makes every entry NaN |
| -inf | makes every entry infinite, and every zero NaN | sets every entry to -inf |
| inf | never shortens; makes everything NaN once the norm is infinite | never changes an entry |

`error_if_nonfinite=True` looks at the norm and not at the threshold, and `foreach` makes no difference. The doctor
reports the first such clip. `clip_grad_norm_(parameters, inf)` whose result is used reads a norm: see
`clip-as-norm`. To switch clipping off, leave the call out.
""",
    "step-with-used-gradients": """\
A step used gradients that a step had already used. No `backward()` came in between and nothing zeroed them, so the
loop moves twice for one gradient and twice as far as the clip allows. The usual cause is a script that was moved to
a `GradScaler` and calls both `scaler.step(optimizer)` and `optimizer.step()`. Two optimizers that hold the same
parameters do the same. The doctor is silent if any gradient of the step is new, and in loops that write gradients
without `backward()`.
""",
    "step-of-scaled-gradients": """\
`optimizer.step()` used gradients that still carry the factor of the `GradScaler`, 65536 at first. The clip, if
there is one, compared them with that factor, and nothing skips the step if they overflow. Call
`scaler.step(optimizer)` in place of `optimizer.step()`. As with `clip-of-scaled-gradients`, the doctor stays silent
if you divided the gradients yourself or read `scaler.get_scale()` after `backward()`.
""",
    "zero-grad-missing": """\
No `zero_grad()` comes between a step and the next `backward()`, so the backward pass adds to gradients that the
step has already used. Every step then repeats earlier gradients, and the clip compares their sum with its
threshold. A frequent place is a loop of several epochs over one batch, as in PPO, with `zero_grad()` above it. Call
`optimizer.zero_grad()` once per step, before its first `backward()`. The doctor reports the fault after three such
steps, at the clip or, if there is none, at the step. It stays silent if you write to the gradients between the step
and the next `backward()`, as with `p.grad.mul_(0.9)`: you may mean a running mean.
""",
    "clip-twice": """\
Two lines clip the same gradients by the norm before one step: a base class and its subclass, a hook and the loop,
or a framework's setting and a line of your own. The smaller threshold decides. The second line sees clipped
gradients, so the norm that it returns is not the norm of the gradient. The doctor reports the second line after
three steps if it always follows the first and if the first has shortened a gradient. It stays silent about lines
that clip different parameters, about `clip_grad_value_` beside a clip by the norm, about norms of different kinds,
and about a second clip that runs only at some steps.
""",
    "clip-with-old-norm": """\
`clip_grads_with_norm_(parameters, max_norm, total_norm)` trusts the norm that it is given. This norm was measured
before the latest `backward()`, on other parameters, or before `scaler.unscale_(optimizer)`, so the gradients are
multiplied by a factor that does not belong to them. Measure right before the clip: `get_total_norm(p.grad for p in
parameters if p.grad is not None)`. The doctor knows a norm only as the tensor that was measured: it does not follow
`float(norm)`, or a norm that you put together from other norms.
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
`sd.clip_rule` derives a threshold from a measured fit. `clip_grad_value_` is not counted.
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
pre-hook, works on the gradients of the step before, or on those of a `backward()` of your own that the closure
repeats. A norm that is read above the step belongs to other gradients than the step's as well. Move the line into
the closure, after its `backward()`. Lightning makes the closure itself: clip in `configure_gradient_clipping()` or
with `gradient_clip_val`, and read norms in `on_before_optimizer_step()`. Reading the norm after the step is
correct: you see the gradient of the last evaluation. The doctor ignores closures without a backward pass. It also
ignores norms that you read in a hook which a library calls inside its closure, such as Lightning's
`on_before_zero_grad`.
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

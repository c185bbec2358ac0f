"""Limits of stability: the largest curvature at which steps do not diverge on a quadratic.

With learning rate lr, momentum b and weight decay w, if nothing is clipped:

========================================  =============================  =========================
optimizer                                 full batches                   small batches
========================================  =============================  =========================
SGD without momentum, Adagrad             2 / lr                         2 / lr
SGD with dampening d, RMSprop (d = 0)     (2 + 2b) / ((1 - d) lr)        (2 - 2b) / ((1 - d) lr)
SGD with Nesterov's momentum              (2 + 2b) / ((1 + 2b) lr)       (2 - 2b) / lr
Adam, AdamW with beta1 = b                (2 / lr) (1 + b) / (1 - b)     2 / lr
========================================  =============================  =========================

**Full batches.** The limit is one of the eigenvalues of H. **Small batches.** Each step has a curvature H_B of its own,
drawn anew, with the mean h. On x of one dimension the mean square of x stays bounded under heavy ball iff::

    S  <=  (2 - 2b) / lr  +  2b / (1 + b) h            S = E[H_B^2] / E[H_B], one measure of batch sharpness

Without noise S = h, and this is the limit of full batches. Where noise rules, S is much larger than h, and the first
term is left: the limit of small batches. It is lr S <= 2 with the rate lr / (1 - b) that one gradient moves x by in
the end, for all optimizers of the table. Batches in between have a limit in between. A row has both limits; which of
them applies depends on the batch, see docs/curvature.md.

Adaptive optimizers are taken with P held fixed and past their first steps; Adagrad at the decayed rate of its last
step. Weight decay in the gradient adds to the curvature: the limit of SGD is less by w, and adaptive optimizers, which
divide it by P, have no one limit. Decoupled weight decay (AdamW) makes 2 / lr into 2 / lr - w.

Source: Cohen et al. 2021, *Gradient descent on neural networks typically occurs at the edge of stability*, for SGD;
Cohen et al. 2022, *Adaptive gradient methods at the edge of stability*, for Adam; all follow from the eigenvalue -1 of
the recurrence. Andreyev et al. 2026, *Momentum further constrains sharpness at the edge of stochastic stability*
(arXiv 2604.14108), for small batches with momentum; the other small-batch limits and the line between the two follow
from the eigenvalue 1 of the recurrence of second moments. tests/adapters/test_stability.py has both spectral radii and
real steps.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from smoothdiag.adapters.protocol import Group, State

Pair = tuple[float, float]
"""Limits for full batches and for small ones."""

NO_PAIR: Pair = (math.nan, math.nan)


def common(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    limits: Callable[[Group, Sequence[State]], Pair],
) -> Pair:
    """Returns the limits that hold for all of ``parameters``. Groups without any of them do not count.

    NaN if groups have different limits, with ``maximize``, and with a momentum of 1 or more.
    """
    counted, found = set(parameters), set()
    for group in optimizer.param_groups:
        if held := [p for p in group["params"] if p in counted]:
            is_known = not group["maximize"] and float(group.get("momentum", 0)) < 1
            found.add(limits(group, [optimizer.state.get(p, {}) for p in held]) if is_known else NO_PAIR)
    return found.pop() if len(found) == 1 else NO_PAIR


def two_over(lr: float) -> float:
    """Returns 2 / lr: infinite for a rate of 0, which never diverges, and NaN for a negative rate."""
    return 2 / lr if lr > 0 else math.inf if lr == 0 else math.nan


def step_counts(states: Sequence[State]) -> set[float]:
    """Returns the different numbers of steps in the states of parameters. It waits once if a device holds them."""
    counts = [state.get("step", 0.0) for state in states]
    tensors = [count for count in counts if isinstance(count, Tensor)]
    read = torch.stack([t.to(tensors[0].device) for t in tensors]).tolist() if tensors else []
    return {*read, *(float(count) for count in counts if not isinstance(count, Tensor))}

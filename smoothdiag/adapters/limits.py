"""Limits of stability: the largest curvature at which steps do not diverge on a quadratic.

With learning rate lr, momentum b and weight decay w, if nothing is clipped:

========================================  =====================================
SGD without momentum, Adagrad             2 / lr
SGD with dampening d, RMSprop (d = 0)     (2 + 2b) / ((1 - d) lr)
SGD with Nesterov's momentum              (2 + 2b) / ((1 + 2b) lr)
Adam, AdamW with beta1 = b                (2 / lr) (1 + b) / (1 - b)
========================================  =====================================

Adaptive optimizers are taken with P held fixed and past their first steps; Adagrad at the decayed rate of its last
step. Weight decay in the gradient adds to the curvature: the limit of SGD is less by w, and adaptive optimizers, which
divide it by P, have no one limit. Decoupled weight decay (AdamW) makes 2 / lr into 2 / lr - w.

Source: Cohen et al. 2021, *Gradient descent on neural networks typically occurs at the edge of stability*, for SGD;
Cohen et al. 2022, *Adaptive gradient methods at the edge of stability*, for Adam. All follow from the eigenvalue -1 of
the recurrence; tests/adapters/test_stability.py has spectral radii and real steps.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from smoothdiag.adapters.protocol import Group, State


def common(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    limit: Callable[[Group, Sequence[State]], float],
) -> float:
    """Returns the limit that holds for all of ``parameters``. Groups without any of them do not count.

    NaN if groups have different limits, with ``maximize``, and with a momentum of 1 or more.
    """
    counted, found = set(parameters), set()
    for group in optimizer.param_groups:
        if held := [p for p in group["params"] if p in counted]:
            is_known = not group["maximize"] and float(group.get("momentum", 0)) < 1
            found.add(limit(group, [optimizer.state.get(p, {}) for p in held]) if is_known else math.nan)
    return found.pop() if len(found) == 1 else math.nan


def two_over(lr: float) -> float:
    """Returns 2 / lr: infinite for a rate of 0, which never diverges, and NaN for a negative rate."""
    return 2 / lr if lr > 0 else math.inf if lr == 0 else math.nan


def step_counts(states: Sequence[State]) -> set[float]:
    """Returns the different numbers of steps in the states of parameters. It waits once if a device holds them."""
    counts = [state.get("step", 0.0) for state in states]
    tensors = [count for count in counts if isinstance(count, Tensor)]
    read = torch.stack([t.to(tensors[0].device) for t in tensors]).tolist() if tensors else []
    return {*read, *(float(count) for count in counts if not isinstance(count, Tensor))}
